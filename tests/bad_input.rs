//! Bad input: one clear error that names the cause and the remedy, or a degraded start that reports itself as degraded.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, Sim, sum, var, wait_for};

fn assert_rejected(args: &[&str], code: i32, words: &[&str]) -> Result<()> {
    let output = Command::new(var("GPU_SAMPLER_BIN")?).args(args).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{args:?}: stderr lacks {word:?}: {stderr}");
    }
    Ok(())
}

#[test]
fn errors_name_the_mistake_and_the_remedy() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("c.toml");
    std::fs::write(&config, "lisen = '127.0.0.1:1'\n")?;
    let config = config.to_string_lossy().into_owned();
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    assert_rejected(&["run", "--config", &config], 1, &["lisen", &config, "gpu-sampler config --default"])?;
    assert_rejected(&["config", "--check", &config], 1, &["lisen", "expected one of"])?;
    assert_rejected(&["run", "--config", "/no/such.toml"], 1, &["/no/such.toml", "No such file"])?;
    assert_rejected(&["run", "--nvml-lib", "/no/such.so"], 1, &["/no/such.so", "does not exist"])?;
    assert_rejected(&["run", "--nvml-lib", "/bin/true", "--listen", "127.0.0.1:0"], 1, &["/bin/true", "--nvml-lib"])?;
    assert_rejected(&["run", "--listen", &address], 1, &[&address, "--listen", "in use"])?;
    assert_rejected(&["run", "--listen", "0.0.0.0:0"], 1, &["--token-file", "--open-metrics"])?;
    assert_rejected(&["run", "--label-sources", "dokcer"], 1, &["dokcer", "docker-file"])?;
    assert_rejected(&["run", "--allowed-host", "https://a.example"], 1, &["\"https://a.example\"", "omit the scheme"])?;
    assert_rejected(&["run", "--allowed-host", "*.example"], 1, &["\"*.example\"", "give every name"])?;
    assert_rejected(&["run", "--lisen", "x"], 2, &["--lisen", "--listen"])?;
    let sysfs = dir.path().to_string_lossy().into_owned();
    let strict = ["run", "--listen", "127.0.0.1:0", "--path-sysfs", &sysfs, "--kernel-mode", "raw_tracepoint"];
    assert_rejected(&strict, 1, &["BTF", "CONFIG_DEBUG_INFO_BTF", &sysfs])
}

#[test]
fn without_btf_the_agent_starts_degraded_and_reports_it() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let empty = tempfile::tempdir()?;
    let agent = Agent::start(Some(&sim), &["--path-sysfs", &empty.path().to_string_lossy()])?;
    let page = agent.scrape()?;
    assert_eq!(sum(&page, "gpu_sampler_kernel_mode", &[("mode", "inotify")]), Some(1.0));
    assert_eq!(sum(&page, "gpu_sampler_kernel_mode", &[("mode", "raw_tracepoint")]), None);
    Ok(())
}

#[test]
fn without_root_the_agent_starts_degraded_and_reports_it() -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let sim = Sim::new("[[gpus]]")?;
    // The unprivileged user needs access to the library and the binary.
    let shared = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir()?;
    let binary = shared.path().join("gpu-sampler");
    std::fs::copy(var("GPU_SAMPLER_BIN")?, &binary)?;
    let port = gpu_sampler_tests::free_port()?;
    let mut command = Command::new(&binary);
    command.args(["run", "--listen", &format!("127.0.0.1:{port}")]).uid(65_534).gid(65_534).env_remove("NVML_SIM_DIR");
    command.stderr(std::process::Stdio::null());
    let _agent = gpu_sampler_tests::Running(command.spawn()?);
    let page =
        wait_for("the agent serves /metrics", Duration::from_secs(20), || Ok(gpu_sampler_tests::get(port, "/metrics").ok()))?;
    let page = gpu_sampler_tests::parse(&page);
    assert_eq!(sum(&page, "gpu_sampler_kernel_mode", &[("mode", "inotify")]), Some(1.0));
    assert_eq!(sum(&page, "gpu_sampler_source_up", &[("source", "nvml")]), Some(0.0));
    drop(sim);
    Ok(())
}

#[test]
fn idle_connections_and_unfinished_requests_delay_no_scrape_and_unfinished_ones_are_disconnected() -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;
    const CONNECTIONS: usize = 600;
    let sim = Sim::new("[[gpus]]")?;
    let agent = Agent::start(Some(&sim), &[])?;
    let mut held = Vec::new();
    for n in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(("127.0.0.1", agent.port))?;
        // Every second one begins a request.
        if n % 2 == 0 {
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: loc")?;
        }
        held.push(stream);
    }
    let from = Instant::now();
    assert!(sum(&agent.scrape()?, "gpu_sampler_build_info", &[]).is_some());
    println!("a scrape took {:?} next to {CONNECTIONS} connections", from.elapsed());
    // 9 s without a bound for each peer.
    ensure!(from.elapsed() < Duration::from_secs(2), "a scrape took {:?}", from.elapsed());
    // All but those within the bound of a peer were disconnected.
    let open = |held: &mut [TcpStream]| -> Result<[usize; 2]> {
        let mut open = [0; 2];
        for (n, stream) in held.iter_mut().enumerate() {
            stream.set_read_timeout(Some(Duration::from_millis(5)))?;
            let is_open = stream.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
            open[n % 2] += usize::from(is_open);
        }
        Ok(open)
    };
    // The last of them ends a moment after the connection that took its place began.
    let [begun, idle] = wait_for("the bound of a peer", Duration::from_secs(5), || {
        let [begun, idle] = open(&mut held)?;
        Ok((begun + idle <= 64).then_some([begun, idle]))
    })?;
    ensure!(begun > 0 && idle > 0, "{begun} with half a request and {idle} idle connections are open");
    // A request that does not end within 10 s is disconnected; an idle connection stays, as that of a scraper does between its scrapes.
    wait_for("all unfinished requests are disconnected", Duration::from_secs(30), || {
        Ok((open(&mut held)?[0] == 0).then_some(()))
    })?;
    let [_, still_idle] = open(&mut held)?;
    ensure!(still_idle == idle, "{still_idle} of {idle} idle connections are open");
    let last = held.iter_mut().skip(1).step_by(2).next_back().context("an idle connection")?;
    last.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    last.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut response = [0; 12];
    last.read_exact(&mut response)?;
    ensure!(response == *b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&response));
    Ok(())
}

#[test]
fn a_body_that_does_not_end_is_refused_and_its_connection_ends() -> Result<()> {
    use std::io::{Read as _, Write as _};
    let sim = Sim::new("[[gpus]]")?;
    let agent = Agent::start(Some(&sim), &[])?;
    let head = "POST /api/v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    for (rest, status) in [("Content-Length: 100\r\n\r\n{\"dur", "408"), ("Content-Length: 2000000\r\n\r\n", "413")] {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", agent.port))?;
        stream.write_all(format!("{head}{rest}").as_bytes())?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        ensure!(response.starts_with(&format!("HTTP/1.1 {status}")), "{response}");
    }
    Ok(())
}
