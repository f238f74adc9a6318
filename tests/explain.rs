//! `explain` and `doctor` about labels: what they print when a runtime fails.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::labels::{AT_ONCE, SOON};
use gpu_sampler_tests::proxy::{Fault, Proxy};
use gpu_sampler_tests::{Agent, Docker, leftovers, run_cli, sum, wait_for};
use serde_json::{Value, json};

/// Runs the agent's verb, checks its exit code and that its output contains these words. Returns standard output.
fn assert_prints(args: &[&str], code: i32, words: &[&str]) -> Result<String> {
    let (got, out, err) = run_cli(args)?;
    assert_eq!(got, Some(code), "{args:?}: {out}{err}");
    for word in words {
        assert!(out.contains(word) || err.contains(word), "{args:?} does not print {word:?}: {out}{err}");
    }
    Ok(out)
}

fn url(agent: &Agent) -> String {
    format!("http://127.0.0.1:{}", agent.port)
}

#[test]
fn explain_names_the_failing_source_of_a_missing_label() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let (id, pid) = docker.pod("prod", "trainer-0", 300)?;
    proxy.set(Fault::Status(500))?;
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker"])?;
    // Containers of others are queried too, and after five errors one query a second is sent for all of them.
    wait_for("the runtime is queried", 3 * SOON, || Ok(agent.container(&id)?.filter(|t| t["tried"][0]["outcome"] == "error")))?;
    let reason =
        [&*format!("image, name could be provided by docker at {endpoint} (HTTP 500"), "docker-file (excluded by label_sources)"];
    let pid = pid.to_string();
    assert_prints(&["explain", "--pid", &pid, "--agent", &url(&agent)], 0, &reason)?;
    // The same without an agent, by any form of the id that users copy.
    let sources = ["--docker-endpoint", &endpoint, "--label-sources", "docker", "--no-agent"];
    for (flag, value) in
        [("--pid", pid.clone()), ("--container", format!("docker://{}", id.to_uppercase())), ("--container", id[..12].into())]
    {
        assert_prints(&[&["explain", flag, &value][..], &sources].concat(), 0, &reason)?;
    }
    // All containers that lack a label, once they are exported.
    wait_for("the container is listed", SOON, || {
        let list = assert_prints(&["explain", "--missing", "--agent", &url(&agent)], 0, &[])?;
        Ok((list.contains(&id) && list.contains("could be provided by docker at")).then_some(()))
    })?;
    let list: Value =
        serde_json::from_str(&assert_prints(&["explain", "--missing", "--json", "--agent", &url(&agent)], 0, &[])?)?;
    let ours = list["containers"].as_array().context("a list")?.iter().find(|c| c["container_id"] == *id).context("ours")?;
    assert_eq!(ours["missing"], json!(["name", "image"]));
    proxy.set(Fault::Pass)?;
    agent.complete(&id, SOON)?;
    Ok(())
}

#[test]
fn containers_are_found_by_name_and_pod_and_ambiguous_prefixes_are_rejected() -> Result<()> {
    let docker = Docker::new()?;
    let agent = Agent::start(None, &[])?;
    let (id, _) = docker.pod("prod", "by-name-0", 300)?;
    agent.complete(&id, SOON)?;
    let agent_url = url(&agent);
    for name in ["by-name-0".to_owned(), format!("/gpu-sampler-test-{}-by-name-0", std::process::id())] {
        let out = assert_prints(&["explain", "--container", &name, "--agent", &agent_url, "--json"], 0, &[])?;
        assert_eq!(serde_json::from_str::<Value>(&out)?["container_id"], json!(id), "{name}");
    }
    let tree = CgroupTree::new("prefixes")?;
    for digit in ["1", "2"] {
        tree.make(&format!("docker/{}{}", "abcd".repeat(15), digit.repeat(4)))?;
    }
    wait_for("the first container is known", AT_ONCE, || agent.container(&format!("{}1111", "abcd".repeat(15))))?;
    wait_for("the second container is known", AT_ONCE, || agent.container(&format!("{}2222", "abcd".repeat(15))))?;
    for more in [&["--agent", &*agent_url][..], &["--no-agent"]] {
        assert_prints(
            &[&["explain", "--container", "abcdabcd"], more].concat(),
            1,
            &["2 container ids begin with abcdabcd", "specify more of the id"],
        )?;
        assert_prints(
            &[&["explain", "--container", "zzz"], more].concat(),
            1,
            &["no container has an id that begins with zzz", "docker ps -a"],
        )?;
    }
    // An ended container is still known for some time.
    drop(docker);
    wait_for("its end is reported", SOON, || Ok(agent.container(&id)?.filter(|explained| explained["ended"].is_string())))?;
    assert_prints(&["explain", "--container", &id, "--agent", &agent_url], 0, &["ended  ", "by-name-0"])?;
    Ok(())
}

#[test]
fn hanging_agents_and_other_servers_are_reported_as_such() -> Result<()> {
    let docker = Docker::new()?;
    let (id, _) = docker.run("unexplained", &json!({}), "300")?;
    let agent = Agent::start(None, &[])?;
    leftovers::kill(agent.process.0.id(), libc::SIGSTOP);
    let result =
        assert_prints(&["explain", "--container", &id, "--agent", &url(&agent)], 1, &["did not respond within", "--no-agent"]);
    leftovers::kill(agent.process.0.id(), libc::SIGCONT);
    result?;
    let other = TcpListener::bind("127.0.0.1:0")?;
    let address = other.local_addr()?;
    std::thread::spawn(move || {
        for mut stream in other.incoming().flatten() {
            let mut head = [0; 2048];
            let _read = stream.read(&mut head);
            let _sent = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\nConnection: close\r\n\r\n<!DOCTYPE");
        }
    });
    for flag in ["--container", "--cgroup"] {
        let value = format!("/docker/{id}");
        let args = ["explain", flag, if flag == "--cgroup" { &value } else { &id }, "--agent", &format!("http://{address}")];
        assert_prints(&args, 1, &["is not a gpu-sampler agent", "--no-agent"])?;
    }
    Ok(())
}

#[test]
fn terminal_control_characters_are_escaped() -> Result<()> {
    let docker = Docker::new()?;
    let labels = json!({"io.kubernetes.pod.name": "evil\u{1b}[31m\nkind          host", "io.kubernetes.pod.namespace": "n",
        "io.kubernetes.container.name": "c"});
    let (id, _) = docker.run("evil", &labels, "300")?;
    let agent = Agent::start(None, &[])?;
    agent.complete(&id, SOON)?;
    let out = assert_prints(&["explain", "--container", &id, "--agent", &url(&agent)], 0, &["evil\\u{1b}[31m\\nkind"])?;
    assert!(!out.contains('\u{1b}') && out.lines().filter(|line| line.starts_with("kind ")).count() == 1, "{out}");
    Ok(())
}

#[test]
fn without_an_agent_missing_cgroups_are_reported_as_missing() -> Result<()> {
    assert_prints(&["explain", "--cgroup", "/nothing/here", "--no-agent"], 0, &["not-container", "there is no such cgroup now"])?;
    let gone = format!("/docker/{}", "c".repeat(64));
    let out = assert_prints(&["explain", "--cgroup", &gone, "--no-agent", "--json"], 0, &[])?;
    let explained: Value = serde_json::from_str(&out)?;
    let fields = (&explained["exists"], &explained["kind"], &explained["answered_by"]);
    assert_eq!(fields, (&json!(false), &json!("container"), &json!("sources")));
    Ok(())
}

#[test]
fn doctor_reports_runtimes_and_where_cadvisor_fails() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let doctor = ["doctor", "--docker-endpoint", &endpoint, "--json", "--listen", "127.0.0.1:0"];
    let checks = || -> Result<Vec<Value>> {
        let (code, out, err) = run_cli(&doctor)?;
        let report: Value = serde_json::from_str(&out).with_context(|| err)?;
        assert_eq!((code, &report["can_run"]), (Some(0), &json!(true)), "{out}");
        Ok(report["checks"].as_array().cloned().unwrap_or_default())
    };
    let named = |checks: &[Value], name: &str| -> Vec<Value> { checks.iter().filter(|c| c["name"] == name).cloned().collect() };
    let text = |check: &Value| {
        format!("{} {}", check["detail"].as_str().unwrap_or_default(), check["remedy"].as_str().unwrap_or_default())
    };
    proxy.set(Fault::Rewrite(Box::new(|path, mut json| {
        if path == "/version" {
            json["Version"] = "dev".into();
            json["MinAPIVersion"] = "1.44".into();
        }
        json
    })))?;
    let all = checks()?;
    let docker_check = named(&all, "docker").remove(0);
    assert!(docker_check["status"] == "ok" && text(&docker_check).contains("version dev, API 1.44 to"), "{docker_check}");
    let warnings = named(&all, "cAdvisor");
    let shown: Vec<String> = warnings.iter().map(text).collect();
    for words in ["finds 0 in \"dev\"", "this engine requires 1.44", "min-api-version", "it connects to /var/run/docker.sock"] {
        assert!(shown.iter().any(|text| text.contains(words)), "{words}: {shown:?}");
    }
    assert!(warnings.iter().all(|check| check["status"] == "warning"));
    for (fault, words) in [
        (Fault::Hang, "the runtime hangs"),
        (Fault::Status(500), "HTTP 500"),
        (Fault::Refuse, "no process listens on this socket"),
    ] {
        proxy.set(fault)?;
        let check = named(&checks()?, "docker").remove(0);
        assert!(check["status"] == "degraded" && text(&check).contains(words), "{words}: {check}");
    }
    proxy.set(Fault::Pass)?;
    proxy.disappear()?;
    let check = named(&checks()?, "docker").remove(0);
    assert!(text(&check).contains("the configured endpoint"), "{check}");
    Ok(())
}

#[test]
fn a_source_is_reported_up_again_without_a_pending_query() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker,docker-file"])?;
    let up = |wanted: f64| {
        wait_for(&format!("source_up is {wanted}"), SOON, || {
            let page = agent.scrape()?;
            let labels = [("source", "docker"), ("endpoint", &*endpoint)];
            Ok(sum(&page, "gpu_sampler_source_up", &labels).filter(|up| *up == wanted))
        })
    };
    up(1.0)?;
    proxy.disappear()?;
    up(0.0)?;
    proxy.appear()?;
    up(1.0)?;
    if agent.knows_only(0.0)? {
        assert_eq!(agent.runtime_calls()?, 0.0);
    }
    std::thread::sleep(Duration::from_secs(1));
    up(1.0)?;
    Ok(())
}
