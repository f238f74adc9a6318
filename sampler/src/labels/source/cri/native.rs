//! containerd's own API, on the same socket as its CRI: for containers that no kubelet made (nerdctl, ctr), which the CRI does not know
//! and of which no file tells the image.
//!
//! Field numbers from containerd's `containers.proto` and `namespaces.proto`. `moby`'s containers are Docker's to name.

use std::collections::HashMap;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};

use crate::labels::source::grpc::{GrpcError, GrpcSocket};

const NAMESPACES: &str = "/containerd.services.namespaces.v1.Namespaces/List";
const GET: &str = "/containerd.services.containers.v1.Containers/Get";
/// In which namespace a request is meant.
const HEADER: &str = "containerd-namespace";
const DOCKERS: &str = "moby";
/// The CRI's own containers have it.
const CRIS: &str = "io.cri-containerd.kind";
/// A machine has a handful.
const MOST_NAMESPACES: usize = 16;

#[derive(Clone, PartialEq, prost::Message)]
struct ListNamespacesRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct ListNamespacesResponse {
    #[prost(message, repeated, tag = "1")]
    namespaces: Vec<Namespace>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Namespace {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetContainerRequest {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetContainerResponse {
    #[prost(message, optional, tag = "1")]
    container: Option<NativeContainer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NativeContainer {
    #[prost(map = "string, string", tag = "2")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "3")]
    image: String,
}

/// `None` when no namespace has it. A server without this API answers that it is unimplemented.
pub async fn find(socket: &GrpcSocket, id: &str) -> Result<Option<Facts>, GrpcError> {
    let all: ListNamespacesResponse = socket.call(NAMESPACES, ListNamespacesRequest {}).await?;
    let names = all.namespaces.into_iter().map(|n| n.name).filter(|name| name != DOCKERS);
    for name in names.take(MOST_NAMESPACES) {
        let request = GetContainerRequest { id: id.to_owned() };
        match socket.call_with::<_, GetContainerResponse>(GET, request, Some((HEADER, &name))).await {
            Ok(answer) => {
                // One of the CRI's, which the CRI does not know (any more): it is not ours to name.
                let container = answer.container.filter(|container| !container.labels.contains_key(CRIS));
                return Ok(container.map(|container| facts(&container, id)));
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn facts(container: &NativeContainer, id: &str) -> Facts {
    // These clients know no pods.
    let mut facts = Facts { runtime: Some(Runtime::Containerd), knows_pods: true, ..Facts::default() };
    facts.set(Label::Name, Some(container.labels.get("nerdctl/name").map_or(id, String::as_str)));
    facts.set(Label::Image, Some(&container.image));
    facts
}
