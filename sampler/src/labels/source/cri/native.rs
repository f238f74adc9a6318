//! containerd's own API, on the same socket as its CRI: for containers of other clients than the kubelet (nerdctl, ctr), which the CRI
//! does not return and of which no file has the image.
//!
//! Field numbers from containerd's `containers.proto` and `namespaces.proto`. A namespace is listed with its name in field 1, and a
//! request has the id in field 1: prost's encoding of a `String`. Containers in `moby` are left to the Docker source.

use std::collections::HashMap;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};

use crate::labels::source::grpc::{GrpcConnection, GrpcError, ListResponse, ObjectResponse};

const NAMESPACES: &str = "/containerd.services.namespaces.v1.Namespaces/List";
const GET: &str = "/containerd.services.containers.v1.Containers/Get";
/// Metadata header with the namespace of a request.
const NAMESPACE_HEADER: &str = "containerd-namespace";
const DOCKER_NAMESPACE: &str = "moby";
/// Label of the CRI's own containers.
const CRI_LABEL: &str = "io.cri-containerd.kind";
/// A machine has a handful.
const MAX_NAMESPACES: usize = 16;

#[derive(Clone, PartialEq, prost::Message)]
struct NativeContainer {
    #[prost(map = "string, string", tag = "2")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "3")]
    image: String,
}

/// Finds a container in all namespaces; `None` if none has it. A server without this API returns `Unimplemented`.
pub async fn find(connection: &GrpcConnection<'_>, id: &str) -> Result<Option<Facts>, GrpcError> {
    let names: ListResponse<String> = connection.call(NAMESPACES, (), None).await?;
    for name in names.items.into_iter().filter(|name| name != DOCKER_NAMESPACE).take(MAX_NAMESPACES) {
        let reply = connection.call::<_, ObjectResponse<NativeContainer>>(GET, id.to_owned(), Some((NAMESPACE_HEADER, &name)));
        match reply.await {
            Ok(reply) => {
                // A container of the CRI that the CRI no longer returns is not named here.
                let container = reply.object.filter(|container| !container.labels.contains_key(CRI_LABEL));
                return Ok(container.map(|container| facts(&container, id)));
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

fn facts(container: &NativeContainer, id: &str) -> Facts {
    // These clients have no pods.
    let mut facts = Facts { runtime: Some(Runtime::Containerd), pod_status_known: true, ..Facts::default() };
    facts.set(Label::Name, Some(container.labels.get("nerdctl/name").map_or(id, String::as_str)));
    facts.set(Label::Image, Some(&container.image));
    facts
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::labels::source::reply::SourceReply;
    use crate::labels::source::tests::check_bounds;

    /// The messages of containerd's own API.
    #[test]
    fn fuzz_containerd() {
        devkit::fuzz(file!(), "containerd", move |bytes| {
            if let Ok(ObjectResponse { object: Some(container) }) = ObjectResponse::<NativeContainer>::decode(bytes) {
                check_bounds(&SourceReply::found(facts(&container, "c1")));
            }
            if let Ok(names) = ListResponse::<String>::decode(bytes) {
                assert!(names.items.iter().map(String::len).sum::<usize>() <= bytes.len());
            }
        });
    }
}
