//! The CRI client against a test server with valid and invalid responses.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sampler_labels::Outcome;

use prost::Message as _;

use super::*;
use crate::labels::source::grpc_server::{Server, ServerReply, entry, field, number};
use crate::labels::source::tests::check_bounds;

const ID: &str = "73e1";
const SANDBOX: &str = "5a00";

fn labels() -> Vec<u8> {
    [
        entry(12, "io.kubernetes.pod.name", "p"),
        entry(12, "io.kubernetes.pod.namespace", "n"),
        entry(12, "io.kubernetes.pod.uid", "u-1"),
        entry(12, "io.kubernetes.container.name", "c"),
    ]
    .concat()
}

fn container(more: &[u8]) -> Vec<u8> {
    let metadata = [field(1, "c"), number(2, 3)].concat();
    let image = [field(1, "registry/i:1"), entry(2, "a", "b")].concat();
    field(
        1,
        [&field(1, ID), &field(2, metadata), &number(3, 1), &number(4, 17), &field(8, image), &field(9, "sha256:ab"), more]
            .concat(),
    )
}

fn sandbox() -> Vec<u8> {
    let metadata = [field(1, "p"), field(2, "u-1"), field(3, "n"), number(4, 2)].concat();
    field(1, [field(1, SANDBOX), field(2, metadata), number(3, 0)].concat())
}

fn not_found() -> ServerReply {
    ServerReply::Status(5, "not found".into())
}

/// A server of one package; other calls return `Unimplemented`, as with grpc-go.
#[derive(Clone)]
struct Node {
    package: &'static str,
    runtime: &'static str,
    container: ServerReply,
    sandbox: ServerReply,
    list: ServerReply,
}

impl Node {
    fn new(package: &'static str, runtime: &'static str) -> Self {
        let list = ServerReply::Message(field(1, [field(1, ID), field(2, SANDBOX)].concat()));
        let container = ServerReply::Message(container(&labels()));
        Self { package, runtime, container, sandbox: ServerReply::Message(sandbox()), list }
    }

    fn reply(&self, path: &str, request: &[u8]) -> ServerReply {
        let Some(method) = path.strip_prefix(&format!("/{}.RuntimeService/", self.package)) else {
            return ServerReply::Status(12, format!("unknown service in {path}"));
        };
        match method {
            "Version" if self.runtime.is_empty() => ServerReply::Status(2, "later".into()),
            "Version" => ServerReply::Message(
                [field(1, "0.1.0"), field(2, self.runtime), field(3, "dev"), field(4, self.package)].concat(),
            ),
            "ContainerStatus" if request == field(1, ID) => self.container.clone(),
            "PodSandboxStatus" if request == field(1, SANDBOX) => self.sandbox.clone(),
            "ListContainers" if request == field(1, field(1, ID)) => self.list.clone(),
            _ => not_found(),
        }
    }

    fn start(&self) -> Server {
        let node = self.clone();
        Server::start(move |path, request| node.reply(path, request))
    }
}

/// `namespace/pod/container name image uid runtime`, followed by `sandbox` and `no pods` if they apply; or the outcome's name.
fn summary(reply: &SourceReply) -> String {
    let Outcome::Found(facts) = &reply.outcome else { return reply.status.name().to_owned() };
    let label = |l: Label| facts.labels[l as usize].as_deref().unwrap_or("-");
    let pod = [Label::Namespace, Label::Pod, Label::Container].map(label).join("/");
    let (name, image, uid) = (label(Label::Name), label(Label::Image), facts.pod_uid.as_deref().unwrap_or("-"));
    let runtime = facts.runtime.map_or("-", Runtime::name);
    let sandbox = if facts.sandbox { " sandbox" } else { "" };
    let pods = if facts.pod_status_known { "" } else { " no pods" };
    format!("{pod} {name} {image} {uid} {runtime}{sandbox}{pods}")
}

async fn check(node: Node, id: &str, expect: &str) -> SourceReply {
    let server = node.start();
    let reply = Cri::new(&server.path, Arc::default()).query(id, None).await;
    assert_eq!(summary(&reply), expect, "{}", reply.detail);
    reply
}

const V1: &str = "runtime.v1";
const ALPHA: &str = "runtime.v1alpha2";

#[tokio::test]
async fn containers_have_the_labels_of_their_pod() {
    check(Node::new(V1, "containerd"), ID, "n/p/c 73e1 registry/i:1 u-1 containerd").await;
    check(Node::new(ALPHA, "containerd"), ID, "n/p/c 73e1 registry/i:1 u-1 containerd").await;
    check(Node::new(V1, "cri-o"), ID, "n/p/c k8s_c_p_n_u-1_3 registry/i:1 u-1 cri-o").await;
    check(Node::new(ALPHA, "docker"), ID, "n/p/c k8s_c_p_n_u-1_3 registry/i:1 u-1 docker").await;
    check(Node::new(V1, "frakti"), ID, "n/p/c 73e1 registry/i:1 u-1 -").await;
    check(Node::new(V1, ""), ID, "n/p/c 73e1 registry/i:1 u-1 -").await;
    check(Node::new(V1, "containerd"), "other", "not-found").await;
    check(Node::new(V1, "containerd"), "", "not-found").await;
    // A response by the prefix of an id: another container.
    let other = ServerReply::Message(field(1, [field(1, "73e1ff"), labels()].concat()));
    check(Node { container: other, ..Node::new(V1, "containerd") }, ID, "not-found").await;
}

#[tokio::test]
async fn sandboxes_are_found_with_every_runtime() {
    check(Node::new(V1, "containerd"), SANDBOX, "n/p/- 5a00 - u-1 containerd sandbox").await;
    check(Node::new(V1, "cri-o"), SANDBOX, "n/p/POD k8s_POD_p_n_u-1_2 - u-1 cri-o sandbox").await;
    // cri-dockerd returns a sandbox like a container.
    let names = [entry(12, "io.kubernetes.pod.name", "p"), entry(12, "io.kubernetes.pod.namespace", "n")].concat();
    let uid = entry(12, "io.kubernetes.pod.uid", "u-1");
    let pod = ServerReply::Message(field(1, [field(1, ID), field(2, field(1, "POD")), names, uid].concat()));
    check(Node { container: pod, ..Node::new(ALPHA, "docker") }, ID, "n/p/POD k8s_POD_p_n_u-1_0 - u-1 docker sandbox").await;
    // Early servers report "not found" in the message only.
    let old_not_found = ServerReply::Status(2, "container with ID starting with 5a00 not found: ID does not exist".into());
    let server = Server::start(move |path, request| match path.ends_with("/ContainerStatus") {
        true => old_not_found.clone(),
        false => Node::new(ALPHA, "cri-o").reply(path, request),
    });
    assert_eq!(
        summary(&Cri::new(&server.path, Arc::default()).query(SANDBOX, None).await),
        "n/p/POD k8s_POD_p_n_u-1_2 - u-1 cri-o sandbox"
    );
}

#[tokio::test]
async fn missing_kubelet_labels_come_from_the_sandbox() {
    let bare = Node { container: ServerReply::Message(container(&[])), ..Node::new(V1, "containerd") };
    check(bare.clone(), ID, "n/p/c 73e1 registry/i:1 u-1 containerd").await;
    let gone = Node { sandbox: not_found(), ..bare.clone() };
    check(gone, ID, "-/-/c 73e1 registry/i:1 - containerd no pods").await;
    let failing = Node { list: ServerReply::Status(13, "busy".into()), runtime: "cri-o", ..bare };
    let reply = check(failing, ID, "-/-/c - registry/i:1 - cri-o no pods").await;
    assert!(reply.detail.contains("/runtime.v1.RuntimeService/ListContainers"), "{}", reply.detail);
}

#[tokio::test]
async fn the_best_name_of_an_image_is_used() {
    for (image, user, reference, expect) in [
        ("i:1", "u:1", "r@sha256:1", "i:1"),
        ("", "u:1", "r@sha256:1", "u:1"),
        ("sha256:ab", "u:1", "", "u:1"),
        ("sha256:ab", "", "r@sha256:1", "r@sha256:1"),
        ("sha256:ab", "", "sha256:cd", "sha256:ab"),
        (&"ab".repeat(32), "", "r", "r"),
        ("", "", "sha256:cd", "sha256:cd"),
        ("", "", "", "-"),
    ] {
        let spec = [field(1, image), field(18, user)].concat();
        let status = [field(1, ID), field(8, spec), field(9, reference), labels()].concat();
        let node = Node { container: ServerReply::Message(field(1, status)), ..Node::new(V1, "containerd") };
        check(node, ID, &format!("n/p/c 73e1 {expect} u-1 containerd")).await;
    }
}

#[tokio::test]
async fn unknown_fields_are_skipped() {
    // A state 99, a signal 200, fields 40 (text), 41 (a message) and 42 (a number), at every level.
    let more = [number(3, 99), number(19, 200), field(40, "new"), field(41, field(1, "x")), number(42, u64::MAX)].concat();
    let mut status = container(&[labels(), more.clone()].concat());
    status.extend(more);
    check(
        Node { container: ServerReply::Message(status), ..Node::new(V1, "containerd") },
        ID,
        "n/p/c 73e1 registry/i:1 u-1 containerd",
    )
    .await;
}

#[tokio::test]
async fn failures_name_the_endpoint_and_the_call() {
    for (reply, expect) in [
        (ServerReply::Message(vec![0xff; 40]), "error"),
        (ServerReply::Message(vec![b'x'; 5 << 20]), "error"),
        (ServerReply::CutOff, "error"),
        (ServerReply::Status(13, "broken".into()), "error"),
        (ServerReply::Hang, "timeout"),
    ] {
        let server = Node { container: reply, ..Node::new(V1, "containerd") }.start();
        let cri = Cri { limit: Duration::from_millis(100), ..Cri::new(&server.path, Arc::default()) };
        let reply = cri.query(ID, None).await;
        assert_eq!(summary(&reply), expect, "{}", reply.detail);
        let call = format!("unix://{} /runtime.v1.RuntimeService/ContainerStatus", server.path.display());
        assert!(reply.detail.contains(&call), "{}", reply.detail);
    }
    let server = Server::raw(&[0x5a; 9000]);
    assert_eq!(summary(&Cri::new(&server.path, Arc::default()).query(ID, None).await), "error");
    let server = Node::new("none", "").start();
    let reply = Cri::new(&server.path, Arc::default()).query(ID, None).await;
    assert_eq!((summary(&reply).as_str(), reply.detail.as_str()), ("not-found", "the server does not implement the CRI"));
    let reply = Cri::new("/nowhere/s.sock", Arc::default()).query(ID, None).await;
    assert_eq!((summary(&reply), reply.detail), ("not-tried".into(), "unix:///nowhere/s.sock: no such socket".into()));
}

#[tokio::test]
async fn a_hung_version_call_costs_only_the_name() {
    let node = Node::new(V1, "cri-o");
    let server = Server::start(move |path, request| match path.ends_with("/Version") {
        true => ServerReply::Hang,
        false => node.reply(path, request),
    });
    let cri = Cri::new(&server.path, Arc::default());
    for _ in 1..MAX_LATE_VERSIONS {
        assert_eq!(summary(&cri.query(ID, None).await), "n/p/c - registry/i:1 u-1 -", "a name that would change later");
    }
    assert_eq!(summary(&cri.query(ID, None).await), "n/p/c 73e1 registry/i:1 u-1 -");
    assert_eq!(summary(&cri.query(ID, Some(Runtime::CriO)).await), "n/p/c k8s_c_p_n_u-1_3 registry/i:1 u-1 cri-o");
}

#[tokio::test]
async fn version_and_runtime_are_cached_per_socket() {
    let (calls, node) = (Arc::new(AtomicUsize::new(0)), Node::new(ALPHA, "cri-o"));
    let counted = Arc::clone(&calls);
    let server = Server::start(move |path, request| {
        counted.fetch_add(1, Ordering::Relaxed);
        node.reply(path, request)
    });
    let cri = Cri::new(&server.path, Arc::default());
    for (n, expect) in [3, 1, 1].into_iter().enumerate() {
        calls.store(0, Ordering::Relaxed);
        assert!(summary(&cri.query(ID, None).await).ends_with("cri-o"));
        assert_eq!(calls.load(Ordering::Relaxed), expect, "query {n}");
    }
    assert_eq!(cri.version().await.unwrap().package, ALPHA);
    // The socket is replaced by another runtime with the other version.
    let node = Node::new(V1, "containerd");
    let _server = Server::start_in(server.stop(), move |path, request| node.reply(path, request));
    assert_eq!(summary(&cri.query(ID, None).await), "n/p/c 73e1 registry/i:1 u-1 containerd");
    let version = cri.version().await.unwrap();
    assert_eq!((version.runtime_version.as_str(), version.package), ("dev", V1));
}

/// Every message that a server may return, decoded from the same bytes.
#[test]
fn fuzz_cri() {
    devkit::fuzz(file!(), "cri", move |bytes| {
        let mut pod = PodSandboxMetadata::default();
        if let Ok(reply) = ObjectResponse::<PodSandboxStatus>::decode(bytes) {
            pod = reply.object.and_then(|status| status.metadata).unwrap_or_default();
        }
        for runtime in [RuntimeLookup::Pending, RuntimeLookup::Resolved(None), RuntimeLookup::Resolved(Some(Runtime::CriO))] {
            check_bounds(&SourceReply::found(facts(ID, None, pod.attempt, &pod, runtime)));
            let Ok(reply) = ObjectResponse::<ContainerStatus>::decode(bytes) else { continue };
            let Some(mut status) = reply.object else { continue };
            let (name, mut own) = names(&mut status);
            own.fill(pod.clone());
            let mut facts = facts(ID, Some(&name), 1, &own, runtime);
            facts.set(Label::Image, image(&status));
            assert_eq!(facts.pod_status_known, own.is_complete());
            check_bounds(&SourceReply::found(facts));
        }
        if let Ok(list) = ListResponse::<Container>::decode(bytes) {
            assert_eq!(ListResponse::decode(&*list.encode_to_vec()), Ok(list));
        }
        if let Ok(version) = VersionResponse::decode(bytes) {
            assert_eq!(VersionResponse::decode(&*version.encode_to_vec()), Ok(version));
        }
    });
}
