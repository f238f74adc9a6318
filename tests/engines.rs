//! The engines and doubles of the tests behave as the tests assume, and leave nothing behind.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::containerd::{Containerd, IMAGE, PodSpec};
use gpu_sampler_tests::cri::{self, CONTAINER_RUNNING, Client, VersionRequest, VersionResponse};
use gpu_sampler_tests::crio::{self, Crio, Speaks};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::kubelet::{self, Kubelet};
use gpu_sampler_tests::leftovers::{cgroups, mounts_below, processes};
use gpu_sampler_tests::podman::{self, Podman};
use gpu_sampler_tests::proxy::{Fault, HUGE, Proxy};
use gpu_sampler_tests::wait_for;
use serde_json::{Value, json};

/// All bytes that a GET of `path` returns within `patience`, unparsed.
fn response(socket: &Path, path: &str, patience: Duration) -> Result<Vec<u8>> {
    let (mut stream, until) = (UnixStream::connect(socket)?, Instant::now() + patience);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    while let left @ 1.. = until.saturating_duration_since(Instant::now()).as_millis() as u64 {
        stream.set_read_timeout(Some(Duration::from_millis(left)))?;
        match stream.read(&mut buffer) {
            Ok(length @ 1..) => bytes.extend_from_slice(&buffer[..length]),
            _ended_or_timed_out => break,
        }
    }
    Ok(bytes)
}

/// A daemon with one response, in chunks, and an endless event stream.
fn daemon(socket: &Path) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || -> Result<()> {
                let mut head = [0; 4096];
                let length = stream.read(&mut head)?;
                let head = String::from_utf8_lossy(&head[..length]).into_owned();
                if head.contains("/events") {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                    loop {
                        stream.write_all(b"6\r\n{\"e\":1\r\n")?;
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
                assert!(head.contains("Connection: close"), "{head}");
                let response_text = match head.contains("HTTP/1.0") {
                    true => "HTTP/1.0 200 OK\r\n\r\n{\"Version\":\"20.10\"}",
                    false => {
                        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n{\"Versio\r\nb\r\nn\":\"20.10\"}\r\n0\r\n\r\n"
                    }
                };
                Ok(stream.write_all(response_text.as_bytes())?)
            });
        }
    });
    Ok(())
}

#[test]
fn the_proxy_produces_each_fault() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (real, front, moved) = (dir.path().join("real"), dir.path().join("front"), dir.path().join("moved"));
    daemon(&real)?;
    let proxy = Proxy::start(&real, &front)?;
    let version = || response(&front, "/version", Duration::from_secs(5));
    let text = || Ok::<_, anyhow::Error>(String::from_utf8_lossy(&version()?).into_owned());
    let body = || Ok::<_, anyhow::Error>(serde_json::from_str::<Value>(text()?.rsplit("\r\n\r\n").next().unwrap_or_default())?);

    let whole = text()?;
    assert!(whole.ends_with("n\":\"20.10\"}\r\n0\r\n\r\n"), "{whole}");
    let events = || response(&front, "/v1.41/events?x", Duration::from_secs(1));
    assert!(String::from_utf8_lossy(&events()?).matches("{\"e\":1").count() > 2);
    proxy.set(Fault::Rewrite(Box::new(|path, mut json| {
        assert_eq!(path, "/version");
        json["Version"] = "dev".into();
        json
    })))?;
    assert_eq!(body()?, json!({"Version": "dev"}));
    assert!(!events()?.is_empty());
    proxy.set(Fault::CloseHalfWay)?;
    assert!(whole.starts_with(&text()?) && text()?.len() == whole.len() / 2);
    proxy.set(Fault::Garbage)?;
    assert!(version()? != version()?);
    proxy.set(Fault::Huge)?;
    let huge = version()?;
    assert!(huge.starts_with(b"HTTP/1.1 200 OK\r\n") && huge.len() > HUGE && huge.ends_with(b"\"}\r\n0\r\n\r\n"));
    proxy.set(Fault::Status(404))?;
    let mut kept = UnixStream::connect(&front)?;
    for _ in 0..2 {
        kept.write_all(b"GET /containers/x HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut bytes = [0; 4096];
        let length = kept.read(&mut bytes)?;
        assert!(bytes[..length].starts_with(b"HTTP/1.1 404 "));
    }
    assert_eq!(proxy.count(), proxy.paths().len() as u64);
    assert_eq!(proxy.paths().iter().filter(|p| *p == "/containers/x").count(), 2);

    proxy.set(Fault::Hang)?;
    assert!(response(&front, "/version", Duration::from_millis(100))?.is_empty());
    let late = std::thread::spawn({
        let front = front.clone();
        move || response(&front, "/version", Duration::from_secs(5))
    });
    wait_for("the request is pending", Duration::from_secs(5), || Ok((proxy.paths().len() as u64 > 12).then_some(())))?;
    proxy.set(Fault::Pass)?;
    assert_eq!(late.join().expect("no panic")?, whole.as_bytes());

    let inode = || Ok::<_, anyhow::Error>(std::fs::metadata(&front)?.ino());
    let before = inode()?;
    proxy.set(Fault::Refuse)?;
    assert!(inode()? == before && UnixStream::connect(&front).is_err());
    assert_eq!(kept.read(&mut [0])?, 0, "open connections end");
    proxy.set(Fault::Pass)?;
    assert_eq!(text()?, whole);
    proxy.disappear()?;
    assert!(!front.exists());
    proxy.set(Fault::Pass)?;
    assert!(!front.exists());
    proxy.appear()?;
    assert_eq!(text()?, whole);
    proxy.move_to(&moved)?;
    assert!(!front.exists() && response(&moved, "/version", Duration::from_secs(5))? == whole.as_bytes());
    drop(proxy);
    assert!(!moved.exists());
    Ok(())
}

/// Asserts that the process is in this cgroup in every hierarchy.
fn assert_in_cgroup(pid: u32, cgroup: &str) -> Result<()> {
    let lines = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    assert!(lines.lines().all(|line| line.ends_with(&format!(":{cgroup}"))), "{pid} is not in {cgroup}: {lines}");
    Ok(())
}

fn assert_nothing_left(dir: &Path, programs: &[&str], cgroup: &str) {
    assert!(!dir.exists(), "{}", dir.display());
    assert_eq!(mounts_below(dir), Vec::<std::path::PathBuf>::new());
    assert_eq!(cgroups(cgroup), Vec::<std::path::PathBuf>::new());
    for program in programs {
        assert_eq!(processes(program, dir), [0; 0], "{program}");
    }
}

fn pods(layout: Layout) -> Result<()> {
    let mut containerd = Containerd::start_in(layout)?;
    let logs = tempfile::tempdir()?;
    let mut spec = PodSpec::new("prod", "trainer-0", "5f0c1b3e-0000-4000-8000-000000000001");
    spec.log_root = Some(logs.path().into());
    spec.kubelet_root = Some(logs.path().join("kubelet"));
    let sandbox = containerd.run_pod(&spec)?;
    let (id, pid) = containerd.run(&sandbox, "main", 0, &["/bin/sleep", "300"])?;
    let cgroup = format!("/kubepods/burstable/pod{}/{id}", spec.uid);
    match layout {
        Layout::PureV2 => assert!(std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?.contains(&format!("0::{cgroup}\n"))),
        _ => assert_in_cgroup(pid, &cgroup)?,
    }
    let bundle = containerd.state().join(format!("io.containerd.runtime.v2.task/k8s.io/{id}/config.json"));
    let config: Value = serde_json::from_slice(&std::fs::read(bundle)?)?;
    for (key, value) in
        [("sandbox-name", "trainer-0"), ("image-name", IMAGE), ("container-name", "main"), ("sandbox-uid", &spec.uid)]
    {
        assert_eq!(config["annotations"][format!("io.kubernetes.cri.{key}")], value);
    }
    let log = logs.path().join(format!("containers/trainer-0_prod_main-{id}.log"));
    assert!(std::fs::read_link(log)?.ends_with(format!("prod_trainer-0_{}/main/0.log", spec.uid)));
    assert!(std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?.contains(&format!("pods/{}/containers/main/", spec.uid)));

    containerd.restart()?;
    let status = containerd.status(&id)?.status.context("status")?;
    assert_eq!((status.state, &*status.labels["io.kubernetes.pod.uid"]), (CONTAINER_RUNNING, &*spec.uid));
    containerd.pause()?;
    UnixStream::connect(containerd.address())?;
    containerd.resume()?;
    containerd.stop_container(&id)?;
    let (again, _) = containerd.run(&sandbox, "main", 1, &["/bin/sleep", "300"])?;
    assert_eq!(containerd.status(&again)?.status.and_then(|s| s.metadata).context("metadata")?.attempt, 1);
    containerd.remove_container(&id)?;
    containerd.pause()?;
    let state = containerd.state();
    drop(containerd);
    assert_nothing_left(state.parent().context("a folder")?, &["containerd"], &spec.cgroup_parent);
    Ok(())
}

#[test]
fn containerd_runs_pods_and_leaves_nothing() -> Result<()> {
    pods(Layout::Machine)
}

#[test]
fn containerd_runs_pods_on_cgroup_v2_alone() -> Result<()> {
    pods(Layout::PureV2)
}

#[test]
fn what_a_panicking_test_started_is_removed() -> Result<()> {
    let spec = PodSpec::new("prod", "doomed", "5f0c1b3e-0000-4000-8000-000000000002");
    let (doomed, (sender, receiver)) = (spec.clone(), std::sync::mpsc::channel());
    let dying = std::thread::spawn(move || -> Result<()> {
        let mut containerd = Containerd::start()?;
        containerd.run(&containerd.run_pod(&doomed)?, "main", 0, &["/bin/sleep", "300"])?;
        sender.send(containerd.state())?;
        containerd.stop();
        panic!("on purpose");
    });
    assert!(dying.join().is_err(), "it panicked");
    assert_nothing_left(receiver.recv()?.parent().context("a folder")?, &["containerd"], &spec.cgroup_parent);
    Ok(())
}

#[test]
fn grpc_passes_through_the_proxy() -> Result<()> {
    let containerd = Containerd::start()?;
    let dir = tempfile::tempdir()?;
    let proxy = Proxy::start(&containerd.address(), &dir.path().join("socket"))?;
    let client = Client::new(&dir.path().join("socket"))?;
    let version = || client.call::<_, VersionResponse>("runtime.v1.RuntimeService", "Version", VersionRequest::default());
    assert_eq!(version()?.runtime_name, "containerd");
    version()?;
    assert_eq!((proxy.count(), proxy.paths().len()), (2, 0));
    for fault in [Fault::Garbage, Fault::CloseHalfWay, Fault::Refuse] {
        proxy.set(fault)?;
        assert!(version().is_err());
        proxy.set(Fault::Pass)?;
        wait_for("calls succeed again", Duration::from_secs(5), || Ok(version().ok()))?;
    }
    proxy.set(Fault::Hang)?;
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let client = Client::new(&dir.path().join("socket"))?;
            Ok::<_, anyhow::Error>(client.call::<_, VersionResponse>(
                "runtime.v1.RuntimeService",
                "Version",
                VersionRequest::default(),
            )?)
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished());
        proxy.set(Fault::Pass)?;
        assert_eq!(waiting.join().expect("no panic")?.runtime_name, "containerd");
        Ok(())
    })
}

#[test]
fn podman_runs_containers_and_leaves_nothing() -> Result<()> {
    let podman = Podman::start()?;
    let (id, pid) = podman.run("one", 300, &["team=vision"])?;
    assert_in_cgroup(pid, &format!("{}/libpod-{id}", podman::PARENT))?;
    let list: Value = serde_json::from_slice(&std::fs::read(podman.root().join("overlay-containers/containers.json"))?)?;
    assert_eq!((&list[0]["id"], &list[0]["names"][0]), (&Value::from(&*id), &"one".into()));
    let inspected = response(&podman.socket(), &format!("/containers/{id}/json"), Duration::from_secs(1))?;
    assert!(String::from_utf8_lossy(&inspected).contains("\"team\":\"vision\""));
    let (other, _) = podman.run("two", 300, &[])?;
    podman.remove("one")?;
    assert_eq!(cgroups(&format!("{}/libpod-{id}", podman::PARENT)), Vec::<std::path::PathBuf>::new());
    let dir = podman.root();
    let dir = dir.parent().context("a folder")?;
    drop(podman);
    assert_nothing_left(dir, &["podman", "conmon"], &format!("{}/libpod-{other}", podman::PARENT));
    Ok(())
}

#[test]
fn the_crio_double_serves_both_protocols_and_writes_files() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let double = Crio::start(dir.path())?;
    let uid = "5f0c1b3e-0000-4000-8000-000000000003";
    let (pod_id, id) = (format!("{:064x}", 1), format!("{:064x}", 2));
    double.add_pod(&crio::Pod::new(&pod_id, "prod", "web-0", uid))?;
    double.add(&crio::CrioContainer::new(&id, &pod_id, "main", "quay.io/vision/train:1", 42))?;
    let client = Client::new(&double.socket())?;
    let all = cri::ListContainersRequest::default();
    for service in [cri::V1, cri::V1ALPHA2] {
        let version: VersionResponse = client.call(service, "Version", VersionRequest::default())?;
        assert_eq!(
            (&*version.runtime_name, format!("runtime.{}.RuntimeService", version.runtime_api_version)),
            ("cri-o", service.into())
        );
        let listed: cri::ListContainersResponse = client.call(service, "ListContainers", all.clone())?;
        assert_eq!((listed.containers.len(), &*listed.containers[0].labels["io.kubernetes.pod.name"]), (1, "web-0"));
    }
    let request = |id: &str| cri::StatusRequest { id: id.into(), verbose: true };
    let status: cri::ContainerStatusResponse = client.call(cri::V1, "ContainerStatus", request(&id))?;
    assert_eq!(status.status.and_then(|s| s.image).context("an image")?.image, "quay.io/vision/train:1");
    let pod: cri::PodSandboxStatusResponse = client.call(cri::V1, "PodSandboxStatus", request(&pod_id))?;
    assert_eq!(pod.status.and_then(|s| s.metadata).context("metadata")?.uid, uid);
    let missing = client.call::<_, cri::ContainerStatusResponse>(cri::V1, "ContainerStatus", request("x"));
    assert_eq!(missing.expect_err("the container does not exist").code(), tonic::Code::NotFound);
    for (speaks, refused) in [(Speaks::V1, cri::V1ALPHA2), (Speaks::V1Alpha2, cri::V1)] {
        double.set(speaks);
        let refusal = client.call::<_, cri::ListContainersResponse>(refused, "ListContainers", all.clone());
        assert_eq!(refusal.expect_err("refused").code(), tonic::Code::Unimplemented);
    }

    let http = |path: &str| response(&double.socket(), path, Duration::from_millis(300));
    let json = |path: &str| {
        Ok::<_, anyhow::Error>(serde_json::from_slice::<Value>(
            http(path)?.split(|b| *b == b'\n').next_back().unwrap_or_default(),
        )?)
    };
    assert_eq!(json("/info")?["storage_root"], double.root().to_string_lossy().as_ref());
    let inspected = json(&format!("/containers/{id}"))?;
    assert_eq!((&inspected["name"], &inspected["pid"]), (&format!("k8s_main_web-0_prod_{uid}_0").into(), &42.into()));
    assert!(http("/containers/x")?.starts_with(b"HTTP/1.1 404 "));
    assert!(double.calls().contains(&"/info".to_owned()));
    let untagged = crio::CrioContainer::new(&format!("{:064x}", 3), &pod_id, "side", "", 43);
    double.add(&untagged)?;
    let inspected = json(&format!("/containers/{:064x}", 3))?;
    assert_eq!((&inspected["image"], &inspected["image_ref"]), (&"".into(), &untagged.image_id().into()));
    for (id, kind, container) in [(&id, "container", "main"), (&pod_id, "sandbox", "POD")] {
        let file = double.runroot().join(format!("overlay-containers/{id}/userdata/config.json"));
        let config: Value = serde_json::from_slice(&std::fs::read(file)?)?;
        let annotations = &config["annotations"];
        assert_eq!(annotations["io.kubernetes.cri-o.ContainerType"], kind);
        assert_eq!(
            (&annotations["io.kubernetes.container.name"], &annotations["io.kubernetes.pod.uid"]),
            (&container.into(), &uid.into())
        );
    }
    double.remove(&id)?;
    assert!(http(&format!("/containers/{id}"))?.starts_with(b"HTTP/1.1 404 "));
    Ok(())
}

#[test]
fn the_kubelet_double_lists_devices() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("kubelet.sock");
    let double = Kubelet::start(&socket)?;
    let client = Client::new(&socket)?;
    let list =
        || client.call::<_, kubelet::ListPodResourcesResponse>(kubelet::SERVICE, "List", kubelet::ListPodResourcesRequest {});
    assert_eq!(list()?, kubelet::ListPodResourcesResponse::default());
    let pods = vec![kubelet::pod("prod", "web-0", "main", "nvidia.com/gpu", &["GPU-1::0"])];
    double.set(pods.clone());
    assert_eq!((list()?.pod_resources, double.calls().len()), (pods, 2));
    drop(double);
    assert!(!socket.exists() && list().is_err());
    Ok(())
}
