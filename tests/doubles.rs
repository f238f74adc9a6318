//! Labels from runtimes that are not packaged here: CRI-O, by its files and over its protocols, and the devices that a kubelet assigned.
//! The cgroups and processes are real; the daemons are doubles that implement the real protocols.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::crio::{Crio, CrioContainer, Pod, Speaks};
use gpu_sampler_tests::kernel::{CgroupTree, attach};
use gpu_sampler_tests::kubelet::{Kubelet, checkpoint, claiming_pod, entry, pod};
use gpu_sampler_tests::labels::{AT_ONCE, SOON, UID, bundle, label_fields, summary};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, run_cli, wait_for};
use serde_json::{Value, json};

const GPU: &str = "GPU-11111111-2222-3333-4444-555555555555";
const MIG: &str = "MIG-aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";

fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

#[test]
fn crio_containers_are_resolved_from_files_and_over_both_protocols() -> Result<()> {
    let root = tempfile::tempdir()?;
    let crio = Crio::start(root.path())?;
    crio.add_pod(&Pod::new(&id('a'), "prod", "trainer-0", UID))?;
    crio.add(&CrioContainer::new(&id('b'), &id('a'), "main", "registry.example/i:1", 1))?;
    let untagged = CrioContainer::new(&id('c'), &id('a'), "side", "", 2);
    crio.add(&untagged)?;
    let tree = CgroupTree::new("crio")?;
    let slice = format!("kubepods.slice/kubepods-pod{}.slice", UID.replace('-', "_"));
    tree.make(&format!("{slice}/crio-{}.scope/container", id('b')))?;
    tree.make(&format!("{slice}/crio-{}.scope/container", id('c')))?;
    // A sandbox without a process of its own has an empty cgroup.
    tree.make(&format!("{slice}/crio-{}", id('a')))?;
    // The monitor, of the container and of each exec in it, is not a container.
    tree.make(&format!("{slice}/crio-conmon-{}.scope", id('b')))?;
    let endpoint = format!("unix://{}", crio.socket().display());
    // Storage and socket at CRI-O's default paths, below a root of its own.
    fs::create_dir_all(root.path().join("run/containers"))?;
    fs::create_dir_all(root.path().join("run/crio"))?;
    std::os::unix::fs::symlink("..", root.path().join("run/containers/storage"))?;
    std::os::unix::fs::symlink("../../crio.sock", root.path().join("run/crio/crio.sock"))?;
    let rootfs = root.path().to_string_lossy().into_owned();
    for (source, speaks) in [
        ("crio-file", Speaks::Both),
        ("crio", Speaks::Both),
        ("cri", Speaks::Both),
        ("cri", Speaks::V1),
        ("cri", Speaks::V1Alpha2),
    ] {
        crio.set(speaks);
        let mut args = vec!["--label-sources", source];
        match source {
            "cri" => args.extend(["--cri-endpoint", &endpoint]),
            _ => args.extend(["--path-rootfs", &rootfs]),
        }
        let agent = Agent::start(None, &args)?;
        let (explained, _) = agent.complete(&id('b'), AT_ONCE).with_context(|| format!("{source} {speaks:?}"))?;
        let sources = label_fields(&explained, "source");
        assert!(sources.iter().all(|(label, from)| label == "id" || from == source), "{explained:#}");
        let name = format!("k8s_main_trainer-0_prod_{UID}_0");
        assert_eq!(summary(&explained), format!("prod/trainer-0/main {name} registry.example/i:1"), "{source}");
        assert_eq!((&explained["runtime"], &explained["kind"]), (&json!("cri-o"), &json!("container")));
        let (explained, _) = agent.complete(&id('c'), AT_ONCE)?;
        let name = format!("k8s_side_trainer-0_prod_{UID}_0");
        assert_eq!(summary(&explained), format!("prod/trainer-0/side {name} {}", untagged.image_id()), "{source}");
        let (explained, _) = agent.complete(&id('a'), AT_ONCE)?;
        assert_eq!(explained["kind"], "sandbox");
        let expected = format!("prod/trainer-0/POD k8s_POD_trainer-0_prod_{UID}_0");
        assert!(summary(&explained).starts_with(&expected), "{source}: {explained:#}");
    }
    Ok(())
}

#[test]
fn crio_is_followed_to_where_its_configuration_puts_it() -> Result<()> {
    let root = tempfile::tempdir()?;
    fs::create_dir_all(root.path().join("moved"))?;
    let crio = Crio::start(&root.path().join("moved"))?;
    crio.add_pod(&Pod::new(&id('a'), "prod", "trainer-0", UID))?;
    crio.add(&CrioContainer::new(&id('b'), &id('a'), "main", "registry.example/i:1", 1))?;
    let tree = CgroupTree::new("crio-moved")?;
    let slice = format!("kubepods.slice/kubepods-pod{}.slice", UID.replace('-', "_"));
    tree.make(&format!("{slice}/crio-{}.scope", id('b')))?;
    // No process of CRI-O runs here, as after its end.
    for (file, text) in [
        ("crio.conf", "[crio]\nroot = '/elsewhere'\nrunroot = '/moved/run'\n[crio.api]\nlisten = '/elsewhere.sock'\n"),
        ("crio.conf.d/10-root.conf", "[crio]\nroot = '/moved/lib'\n"),
        ("crio.conf.d/20-listen.conf", "[crio.api]\nlisten = 'unix:///moved/crio.sock'\n"),
    ] {
        let path = root.path().join("etc/crio").join(file);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(path, text)?;
    }
    let rootfs = root.path().to_string_lossy().into_owned();
    for source in ["crio-file", "crio", "cri"] {
        let args = ["--path-rootfs", &rootfs, "--label-sources", source];
        let agent = Agent::start(None, &args)?;
        let (explained, _) = agent.complete(&id('b'), SOON).context(source)?;
        assert!(summary(&explained).starts_with("prod/trainer-0/main k8s_main_"), "{source}: {explained:#}");
        let (_, out, _) = run_cli(&[&["doctor", "--json"], &args[..]].concat())?;
        let report: Value = serde_json::from_str(&out)?;
        let named = |name: &str| report["checks"].as_array().into_iter().flatten().any(|c| c["name"] == name);
        assert!(source == "crio-file" || named(source), "{source}: {out}");
    }
    Ok(())
}

/// `pod/container gpu` of each series.
fn assigned(page: &[Sample]) -> Vec<String> {
    let ours = page.iter().filter(|s| s.name == "container_gpu_assigned" && s.value == 1.0);
    let mut all: Vec<String> =
        ours.map(|s| format!("{}/{} {}", s.labels["pod"], s.labels["container"], s.labels["uuid"])).collect();
    all.sort();
    all
}

#[test]
fn assigned_gpus_have_series_whether_they_are_used_or_not() -> Result<()> {
    let world = format!("[[gpus]]\nuuid = '{GPU}'\nminor = 7\n[[gpus]]\nuuid = 'GPU-second'\nmig = ['{MIG}']\n");
    let (sim, root) = (Sim::new(&world)?, tempfile::tempdir()?);
    let kubelet = root.path().join("var/lib/kubelet");
    let tree = CgroupTree::new("assigned")?;
    let names = ["whole", "slice", "partition", "minor", "none"];
    for (n, name) in names.iter().enumerate() {
        let uid = format!("{n}bb25662-de9a-11e9-84e7-f8f21e04010c");
        let id = format!("{n:064x}");
        bundle(root.path(), &id, name, &uid)?;
        tree.make(&format!("kubepods/pod{uid}/{id}"))?;
    }
    let uid = |n: usize| format!("{n}bb25662-de9a-11e9-84e7-f8f21e04010c");
    let entries = json!([
        entry(&uid(0), "main", "nvidia.com/gpu", &[GPU]),
        entry(&uid(1), "main", "nvidia.com/gpu.shared", &[&format!("{GPU}::3")]),
        entry(&uid(2), "main", "nvidia.com/mig-1g.5gb", &[MIG]),
        entry(&uid(3), "main", "nvidia.com/gpu", &["nvidia7/vgpu2"]),
        entry(&uid(4), "main", "rdma/hca", &["mlx5_0"]),
    ]);
    checkpoint(&kubelet, &entries)?;
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &rootfs, "--label-sources", "bundle,kubelet"])?;
    let expected =
        [format!("minor/main {GPU}"), format!("partition/main {MIG}"), format!("slice/main {GPU}"), format!("whole/main {GPU}")];
    wait_for("the containers with assigned GPUs have series", SOON, || {
        let page = agent.scrape()?;
        Ok((assigned(&page) == expected).then_some(()))
    })
    .with_context(|| format!("{:?}", agent.scrape().map(|page| assigned(&page))))?;
    // Idle and observed is 0; a GPU that is not assigned has no series.
    wait_for("the idle containers have 0", SOON, || {
        let page = agent.scrape()?;
        let value = |name: &str, pod: &str| page.iter().find(|s| s.name == name && s.labels["pod"] == pod).map(|s| s.value);
        assert_eq!(value("container_gpu_seconds_total", "none"), None);
        let zero = ["container_gpu_seconds_total", "container_accelerator_duty_cycle", "container_accelerator_memory_used_bytes"];
        Ok(zero.iter().all(|name| value(name, "whole") == Some(0.0)).then_some(()))
    })?;
    // The kubelet withdraws the other assignments.
    checkpoint(&kubelet, &json!([entry(&uid(0), "main", "nvidia.com/gpu", &[GPU])]))?;
    wait_for("the other series end", SOON, || Ok((assigned(&agent.scrape()?) == [format!("whole/main {GPU}")]).then_some(())))?;
    Ok(())
}

#[test]
fn without_a_checkpoint_the_kubelet_is_queried_only_when_containers_start() -> Result<()> {
    let world = format!("[[gpus]]\nuuid = '{GPU}'\n");
    let (sim, root) = (Sim::new(&world)?, tempfile::tempdir()?);
    let folder = root.path().join("var/lib/kubelet/pod-resources");
    fs::create_dir_all(&folder)?;
    let kubelet = Kubelet::start(&folder.join("kubelet.sock"))?;
    kubelet.set(vec![pod("prod", "trainer-0", "main", "nvidia.com/gpu", &[GPU])]);
    let tree = CgroupTree::new("pod-resources")?;
    let id = id('c');
    bundle(root.path(), &id, "trainer-0", UID)?;
    let cgroup = tree.make(&format!("kubepods/pod{UID}/{id}"))?;
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &rootfs, "--label-sources", "bundle,kubelet"])?;
    let expected = [format!("trainer-0/main {GPU}")];
    wait_for("the container has a series", SOON, || Ok((assigned(&agent.scrape()?) == expected).then_some(())))?;
    // The kubelet may have been queried before the container was known, and after.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let (calls, before) = (kubelet.calls(), agent.knows_only(1.0)?);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let after = kubelet.calls();
    if before && agent.knows_only(1.0)? {
        assert_eq!(after, calls, "no container was started, so there is no query");
    }
    // When the GPU is used, there is still one series.
    let sleeper = Running(Command::new("sleep").arg("300").spawn()?);
    let pid = sleeper.0.id();
    attach(pid, &cgroup)?;
    let _load = sim.load(pid, 0, 0.8, &[])?;
    wait_for("the container has GPU time", SOON, || {
        let page = agent.scrape()?;
        let ours: Vec<&Sample> = page.iter().filter(|s| s.name == "container_gpu_seconds_total").collect();
        assert!(ours.len() <= 1, "{ours:?}");
        Ok((ours.iter().any(|s| s.value > 0.0) && assigned(&page) == expected).then_some(()))
    })?;
    Ok(())
}

/// Dynamic MIG: only the checkpoint of the DRA driver knows the UUID of the device that it has made for the claim.
#[test]
fn resource_claims_assign_what_the_dra_driver_has_prepared() -> Result<()> {
    let claim = "3c8337ad-f366-4541-883d-30b9e99fd6be";
    let (device, cdi) = ("gpu-0-mig-1g10gb-19-0", format!("k8s.gpu.nvidia.com/claim={claim}-gpu-0-mig-1g10gb-19-0"));
    let world = format!("[[gpus]]\nuuid = '{GPU}'\n[[gpus.mig]]\nuuid = '{MIG}'\n");
    let (sim, root) = (Sim::new(&world)?, tempfile::tempdir()?);
    let folder = root.path().join("var/lib/kubelet");
    fs::create_dir_all(folder.join("pod-resources"))?;
    fs::create_dir_all(folder.join("plugins/gpu.nvidia.com"))?;
    let prepared = json!({"checksum": 1, "v2": {"checksum": 2, "preparedClaims": {claim: {"checkpointState": "PrepareCompleted",
        "status": {}, "preparedDevices": [{"devices": [{"mig": {
            "concrete": {"parentMinor": 0, "giId": 1, "ciId": 0, "migUUID": MIG, "parentUUID": GPU},
            "device": {"Requests": ["gpu"], "PoolName": "node-1", "DeviceName": device, "CDIDeviceIDs": [cdi]}}}]}]}}}});
    fs::write(folder.join("plugins/gpu.nvidia.com/checkpoint.json"), prepared.to_string())?;
    let kubelet = Kubelet::start(&folder.join("pod-resources/kubelet.sock"))?;
    kubelet.set(vec![claiming_pod("prod", "trainer-0", "main", device, &[&cdi])]);
    let (tree, id) = (CgroupTree::new("claims")?, id('e'));
    bundle(root.path(), &id, "trainer-0", UID)?;
    tree.make(&format!("kubepods/pod{UID}/{id}"))?;
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent = Agent::start(Some(&sim), &["--path-rootfs", &rootfs, "--label-sources", "bundle,kubelet"])?;
    let expected = [format!("trainer-0/main {MIG}")];
    wait_for("the claim is an assignment", SOON, || {
        let page = agent.scrape()?;
        let by_claim = page.iter().any(|s| s.name == "container_gpu_assigned" && s.labels["source"] == "claim");
        Ok((assigned(&page) == expected && by_claim).then_some(()))
    })
}
