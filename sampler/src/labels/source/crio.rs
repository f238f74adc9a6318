//! CRI-O's own HTTP API, on the same socket as its CRI: `GET /containers/<id>`.

use std::collections::HashMap;

use sampler_core::cgroup_path::Runtime;
use sampler_labels::{Facts, Label};
use serde::Deserialize;

use super::http::HttpClient;
use super::reply::SourceReply;

#[derive(Default, Deserialize)]
#[serde(default)]
struct CrioContainer {
    name: Option<String>,
    image: Option<String>,
    /// The id of an image without a name, for which `image` is empty.
    image_ref: Option<String>,
    labels: Option<HashMap<String, String>>,
    sandbox: Option<String>,
}

pub async fn query(client: &HttpClient, id: &str) -> SourceReply {
    let container = client.record::<CrioContainer>(&format!("/containers/{id}")).await;
    container.map_or_else(SourceReply::from, |container| SourceReply::found(facts(&container, id)))
}

fn facts(container: &CrioContainer, id: &str) -> Facts {
    let mut facts = Facts { runtime: Some(Runtime::CriO), pod_status_known: true, ..Facts::default() };
    facts.set(Label::Name, container.name.as_deref());
    facts.set(Label::Image, container.image.as_deref().filter(|image| !image.is_empty()).or(container.image_ref.as_deref()));
    let get = |key: &str| container.labels.as_ref()?.get(key).map(String::as_str);
    facts.from_kubelet_labels(get);
    facts.sandbox = container.sandbox.as_deref() == Some(id) || get("io.kubernetes.container.name") == Some("POD");
    facts.from_dockershim_name(container.name.as_deref().unwrap_or_default());
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::source::tests::{check, check_bounds};

    #[test]
    fn containers_of_crio_have_all_labels() {
        let case = |text: &str, expect: &str| {
            check(&SourceReply::found(facts(&serde_json::from_str(text).unwrap(), "c1")), expect);
        };
        case(
            r#"{"name":"k8s_c_p_n_u_0","pid":1,"image":"i","labels":{"io.kubernetes.pod.name":"p"},"new":[1]}"#,
            "n/p/c k8s_c_p_n_u_0 i",
        );
        case(r#"{"name":"k8s_POD_p_n_u_0","sandbox":"c1","labels":null}"#, "sandbox n/p/POD k8s_POD_p_n_u_0 -");
        case(r#"{"name":"k8s_c_p_n_u_0","image":"","image_ref":"sha256:1"}"#, "n/p/c k8s_c_p_n_u_0 sha256:1");
        case("{}", "-/-/- - -");
    }

    #[test]
    fn fuzz_crio() {
        devkit::fuzz(file!(), "crio", move |bytes| {
            let Ok(container) = serde_json::from_slice(bytes) else { return };
            check_bounds(&SourceReply::found(facts(&container, "c1")));
        });
    }
}
