//! A double of the kubelet's pod-resources service, which lists the devices of each container.
//!
//! Field numbers: kubernetes, `staging/src/k8s.io/kubelet/pkg/apis/podresources/v1/api.proto`.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use prost::Message;
use serde_json::{Value, json};
use tonic::Status;

use crate::grpc::{GrpcServer, Service};

pub const SERVICE: &str = "v1.PodResourcesLister";

#[derive(Clone, PartialEq, Message)]
pub struct ListPodResourcesRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct ListPodResourcesResponse {
    #[prost(message, repeated, tag = "1")]
    pub pod_resources: Vec<PodResources>,
}

#[derive(Clone, PartialEq, Message)]
pub struct PodResources {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(message, repeated, tag = "3")]
    pub containers: Vec<ContainerResources>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerResources {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, repeated, tag = "2")]
    pub devices: Vec<ContainerDevices>,
    #[prost(int64, repeated, tag = "3")]
    pub cpu_ids: Vec<i64>,
    #[prost(message, repeated, tag = "5")]
    pub dynamic_resources: Vec<DynamicResource>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ContainerDevices {
    /// `nvidia.com/gpu`, or the name that device sharing gives it.
    #[prost(string, tag = "1")]
    pub resource_name: String,
    #[prost(string, repeated, tag = "2")]
    pub device_ids: Vec<String>,
    #[prost(message, optional, tag = "3")]
    pub topology: Option<TopologyInfo>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TopologyInfo {
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NumaNode>,
}

#[derive(Clone, PartialEq, Message)]
pub struct NumaNode {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// A device that comes from a resource claim instead of a device plugin.
#[derive(Clone, PartialEq, Message)]
pub struct DynamicResource {
    #[prost(string, tag = "2")]
    pub claim_name: String,
    #[prost(string, tag = "3")]
    pub claim_namespace: String,
    #[prost(message, repeated, tag = "4")]
    pub claim_resources: Vec<ClaimResource>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ClaimResource {
    #[prost(message, repeated, tag = "1")]
    pub cdi_devices: Vec<CdiDevice>,
    #[prost(string, tag = "2")]
    pub driver_name: String,
    #[prost(string, tag = "3")]
    pub pool_name: String,
    #[prost(string, tag = "4")]
    pub device_name: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct CdiDevice {
    /// `nvidia.com/gpu=GPU-..`
    #[prost(string, tag = "1")]
    pub name: String,
}

/// A pod with one container that has these devices of one resource.
pub fn pod(namespace: &str, name: &str, container: &str, resource: &str, devices: &[&str]) -> PodResources {
    let device_ids = devices.iter().map(|id| (*id).to_owned()).collect();
    let topology = Some(TopologyInfo { nodes: vec![NumaNode { id: 0 }] });
    let devices = vec![ContainerDevices { resource_name: resource.into(), device_ids, topology }];
    let containers = vec![ContainerResources { name: container.into(), devices, ..Default::default() }];
    PodResources { name: name.into(), namespace: namespace.into(), containers }
}

/// A pod with one container that has this device of NVIDIA's DRA driver.
pub fn claiming_pod(namespace: &str, name: &str, container: &str, device: &str, cdi: &[&str]) -> PodResources {
    let cdi_devices = cdi.iter().map(|name| CdiDevice { name: (*name).to_owned() }).collect();
    let (driver_name, device_name) = ("gpu.nvidia.com".to_owned(), device.to_owned());
    let claim_resources = vec![ClaimResource { cdi_devices, driver_name, pool_name: "node-1".into(), device_name }];
    let claim = DynamicResource { claim_name: "gpu".into(), claim_namespace: namespace.into(), claim_resources };
    let containers = vec![ContainerResources { name: container.into(), dynamic_resources: vec![claim], ..Default::default() }];
    PodResources { name: name.into(), namespace: namespace.into(), containers }
}

#[derive(Default)]
struct Pods(Mutex<Vec<PodResources>>);

impl Service for Pods {
    fn grpc(&self, service: &str, method: &str, request: &[u8]) -> Result<Vec<u8>, Status> {
        if (service, method) != (SERVICE, "List") {
            return Err(Status::unimplemented(format!("unknown method {method} for service {service}")));
        }
        ListPodResourcesRequest::decode(request).map_err(|error| Status::internal(error.to_string()))?;
        let pod_resources = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(ListPodResourcesResponse { pod_resources }.encode_to_vec())
    }
}

pub struct Kubelet {
    pods: Arc<Pods>,
    server: GrpcServer,
}

impl Kubelet {
    /// Listens on `socket`, which in a cluster is /var/lib/kubelet/pod-resources/kubelet.sock.
    pub fn start(socket: &Path) -> Result<Self> {
        let pods = Arc::<Pods>::default();
        Ok(Self { server: GrpcServer::start(socket, pods.clone())?, pods })
    }

    pub fn set(&self, pods: Vec<PodResources>) {
        *self.pods.0.lock().unwrap_or_else(PoisonError::into_inner) = pods;
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<String> {
        self.server.calls()
    }
}

/// Writes a kubelet's checkpoint: the devices of each container.
pub fn checkpoint(folder: &Path, entries: &Value) -> Result<()> {
    let text =
        json!({"Data": {"PodDeviceEntries": entries, "RegisteredDevices": {"nvidia.com/gpu": []}}, "Checksum": 1}).to_string();
    let folder = folder.join("device-plugins");
    fs::create_dir_all(&folder)?;
    // Renamed into place, as the kubelet does it, so that no reader gets a part of it.
    fs::write(folder.join("new"), text)?;
    Ok(fs::rename(folder.join("new"), folder.join("kubelet_internal_checkpoint"))?)
}

/// An entry of the checkpoint.
pub fn entry(uid: &str, container: &str, resource: &str, devices: &[&str]) -> Value {
    json!({"PodUID": uid, "ContainerName": container, "ResourceName": resource, "DeviceIDs": {"-1": devices}, "AllocResp": ""})
}
