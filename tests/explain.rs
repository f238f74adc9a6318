//! `explain` and `doctor` about labels: what people see when something is wrong with a runtime.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::labels::{AT_ONCE, SOON};
use gpu_sampler_tests::proxy::{Fault, Proxy};
use gpu_sampler_tests::{Agent, Docker, leftovers, sum, told, wait_for};
use serde_json::{Value, json};

fn says(args: &[&str], code: i32, words: &[&str]) -> Result<String> {
    let (got, out, err) = told(args)?;
    assert_eq!(got, Some(code), "{args:?}: {out}{err}");
    for word in words {
        assert!(out.contains(word) || err.contains(word), "{args:?} does not say {word:?}: {out}{err}");
    }
    Ok(out)
}

fn url(agent: &Agent) -> String {
    format!("http://127.0.0.1:{}", agent.port)
}

#[test]
fn the_incident_that_began_it_all_ends_with_one_command() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let (id, pid) = docker.pod("prod", "trainer-0", 300)?;
    proxy.set(Fault::Status(500))?;
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker"])?;
    wait_for("it was asked", AT_ONCE, || Ok(agent.container(&id)?.filter(|t| t["tried"][0]["outcome"] == "error")))?;
    let why =
        [&*format!("image, name would come from docker at {endpoint} (HTTP 500"), "docker-file (left out by label_sources)"];
    let pid = pid.to_string();
    says(&["explain", "--pid", &pid, "--agent", &url(&agent)], 0, &why)?;
    // And without an agent, by whatever people paste.
    let sources = ["--docker-endpoint", &endpoint, "--label-sources", "docker", "--no-agent"];
    for (flag, value) in
        [("--pid", pid.clone()), ("--container", format!("docker://{}", id.to_uppercase())), ("--container", id[..12].into())]
    {
        says(&[&["explain", flag, &value][..], &sources].concat(), 0, &why)?;
    }
    // All that lack a label, once they are shown.
    wait_for("it is listed", SOON, || {
        let list = says(&["explain", "--missing", "--agent", &url(&agent)], 0, &[])?;
        Ok((list.contains(&id) && list.contains("would come from docker at")).then_some(()))
    })?;
    let list: Value = serde_json::from_str(&says(&["explain", "--missing", "--json", "--agent", &url(&agent)], 0, &[])?)?;
    let ours = list["containers"].as_array().context("a list")?.iter().find(|c| c["container_id"] == *id).context("ours")?;
    assert_eq!(ours["missing"], json!(["name", "image"]));
    proxy.set(Fault::Pass)?;
    agent.complete(&id, SOON)?;
    Ok(())
}

#[test]
fn containers_by_name_by_pod_and_by_too_little() -> Result<()> {
    let docker = Docker::new()?;
    let agent = Agent::start(None, &[])?;
    let (id, _) = docker.pod("prod", "by-name-0", 300)?;
    agent.complete(&id, SOON)?;
    let agent_url = url(&agent);
    for name in ["by-name-0".to_owned(), format!("/gpu-sampler-test-{}-by-name-0", std::process::id())] {
        let out = says(&["explain", "--container", &name, "--agent", &agent_url, "--json"], 0, &[])?;
        assert_eq!(serde_json::from_str::<Value>(&out)?["container_id"], json!(id), "{name}");
    }
    let tree = CgroupTree::new("prefixes")?;
    for digit in ["1", "2"] {
        tree.make(&format!("docker/{}{}", "abcd".repeat(15), digit.repeat(4)))?;
    }
    wait_for("both are known", AT_ONCE, || agent.container(&format!("{}1111", "abcd".repeat(15))))?;
    wait_for("both are known", AT_ONCE, || agent.container(&format!("{}2222", "abcd".repeat(15))))?;
    for more in [&["--agent", &*agent_url][..], &["--no-agent"]] {
        says(
            &[&["explain", "--container", "abcdabcd"], more].concat(),
            1,
            &["2 containers begin with abcdabcd", "give more of the id"],
        )?;
        says(&[&["explain", "--container", "zzz"], more].concat(), 1, &["no container's id begins with zzz", "docker ps -a"])?;
    }
    // Gone, and still known for a while.
    drop(docker);
    wait_for("its end is told", SOON, || Ok(agent.container(&id)?.filter(|told| told["ended"].is_string())))?;
    says(&["explain", "--container", &id, "--agent", &agent_url], 0, &["ended  ", "by-name-0"])?;
    Ok(())
}

#[test]
fn agents_that_hang_and_servers_that_are_none() -> Result<()> {
    let docker = Docker::new()?;
    let (id, _) = docker.run("beside", &json!({}), "300")?;
    let agent = Agent::start(None, &[])?;
    leftovers::kill(agent.process.0.id(), libc::SIGSTOP);
    let answer = says(&["explain", "--container", &id, "--agent", &url(&agent)], 1, &["did not answer within", "--no-agent"]);
    leftovers::kill(agent.process.0.id(), libc::SIGCONT);
    answer?;
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
        says(&args, 1, &["that is no gpu-sampler agent", "--no-agent"])?;
    }
    Ok(())
}

#[test]
fn what_would_steer_a_terminal_is_shown_and_not_sent() -> Result<()> {
    let docker = Docker::new()?;
    let labels = json!({"io.kubernetes.pod.name": "evil\u{1b}[31m\nkind          host", "io.kubernetes.pod.namespace": "n",
        "io.kubernetes.container.name": "c"});
    let (id, _) = docker.run("evil", &labels, "300")?;
    let agent = Agent::start(None, &[])?;
    agent.complete(&id, SOON)?;
    let out = says(&["explain", "--container", &id, "--agent", &url(&agent)], 0, &["evil\\u{1b}[31m\\nkind"])?;
    assert!(!out.contains('\u{1b}') && out.lines().filter(|line| line.starts_with("kind ")).count() == 1, "{out}");
    Ok(())
}

#[test]
fn without_an_agent_what_is_not_there_is_said_to_be_not_there() -> Result<()> {
    says(&["explain", "--cgroup", "/nothing/here", "--no-agent"], 0, &["not-container", "there is no such cgroup now"])?;
    let gone = format!("/docker/{}", "c".repeat(64));
    let out = says(&["explain", "--cgroup", &gone, "--no-agent", "--json"], 0, &[])?;
    let told: Value = serde_json::from_str(&out)?;
    assert_eq!((&told["exists"], &told["kind"], &told["answered_by"]), (&json!(false), &json!("container"), &json!("sources")));
    Ok(())
}

#[test]
fn doctor_shows_runtimes_and_where_cadvisor_gives_up() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let doctor = ["doctor", "--docker-endpoint", &endpoint, "--json", "--listen", "127.0.0.1:0"];
    let rows = || -> Result<Vec<Value>> {
        let (code, out, err) = told(&doctor)?;
        let report: Value = serde_json::from_str(&out).with_context(|| err)?;
        assert_eq!((code, &report["can_run"]), (Some(0), &json!(true)), "{out}");
        Ok(report["checks"].as_array().cloned().unwrap_or_default())
    };
    let of = |rows: &[Value], name: &str| -> Vec<Value> { rows.iter().filter(|r| r["name"] == name).cloned().collect() };
    let text =
        |row: &Value| format!("{} {}", row["detail"].as_str().unwrap_or_default(), row["remedy"].as_str().unwrap_or_default());
    proxy.set(Fault::Rewrite(Box::new(|path, mut json| {
        if path == "/version" {
            json["Version"] = "dev".into();
            json["MinAPIVersion"] = "1.44".into();
        }
        json
    })))?;
    let all = rows()?;
    let docker_row = of(&all, "docker").remove(0);
    assert!(docker_row["status"] == "ok" && text(&docker_row).contains("version dev, API 1.44 to"), "{docker_row}");
    let warnings = of(&all, "cAdvisor");
    let shown: Vec<String> = warnings.iter().map(text).collect();
    for words in ["finds 0 in \"dev\"", "this engine wants 1.44", "min-api-version", "it looks for /var/run/docker.sock"] {
        assert!(shown.iter().any(|row| row.contains(words)), "{words}: {shown:?}");
    }
    assert!(warnings.iter().all(|row| row["status"] == "warning"));
    for (fault, words) in
        [(Fault::Hang, "the runtime hangs"), (Fault::Status(500), "HTTP 500"), (Fault::Refuse, "nobody listens on this socket")]
    {
        proxy.set(fault)?;
        let row = of(&rows()?, "docker").remove(0);
        assert!(row["status"] == "degraded" && text(&row).contains(words), "{words}: {row}");
    }
    proxy.set(Fault::Pass)?;
    proxy.disappear()?;
    let row = of(&rows()?, "docker").remove(0);
    assert!(text(&row).contains("which was given by name"), "{row}");
    Ok(())
}

#[test]
fn a_source_is_up_again_though_nobody_has_to_be_asked() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker,docker-file"])?;
    let up = |wanted: f64| {
        wait_for("the metric", SOON, || {
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
    assert_eq!(agent.calls()?, 0.0);
    std::thread::sleep(Duration::from_secs(1));
    up(1.0)?;
    Ok(())
}
