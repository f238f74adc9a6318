//! TLS, client certificates, basic authentication and tokens: with real clients, and with clients that mean harm.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::certificates::{Authority, Validity};
use gpu_sampler_tests::kernel::Layout;
use gpu_sampler_tests::prometheus::PrometheusServer;
use gpu_sampler_tests::{Agent, Sample, Sim, parse, run_cli, sum, wait_for};

const PASSWORD: &str = "correct horse";
const TOKEN: &str = "token-of-the-scraper";
const SHIPPED: &str = include_str!("../deploy/prometheus/scrape-tls.yml");

/// The files of an agent with TLS, users, client certificates and tokens.
struct Setup {
    dir: tempfile::TempDir,
    authority: Authority,
}

/// A response as curl saw it; the status is 0 if there was none.
#[derive(Debug)]
struct Reply {
    status: u16,
    text: String,
    /// curl's error message.
    error: String,
}

impl Setup {
    fn new() -> Result<Self> {
        let this = Self { dir: tempfile::tempdir()?, authority: Authority::new()? };
        this.authority.write(&this.path("ca.pem"))?;
        this.authority.issue(this.dir.path(), "server", Validity::Valid)?;
        this.authority.issue(this.dir.path(), "client", Validity::Valid)?;
        this.authority.issue(this.dir.path(), "expired", Validity::Expired)?;
        Authority::new()?.issue(this.dir.path(), "stranger", Validity::Valid)?;
        std::fs::write(this.path("password"), PASSWORD)?;
        std::fs::write(this.path("token"), format!("{TOKEN}\n"))?;
        let hash = bcrypt::hash(PASSWORD, 5)?;
        let web = format!(
            "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n  client_auth_type: VerifyClientCertIfGiven\n  \
             client_ca_file: ca.pem\nbasic_auth_users:\n  prometheus: {hash}\n"
        );
        std::fs::write(this.path("web.yml"), web)?;
        let certificates = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n  client_auth_type: \
                            RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n";
        std::fs::write(this.path("certificates.yml"), certificates)?;
        Ok(this)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// With every kind of credentials.
    fn agent(&self, sim: &Sim) -> Result<Agent> {
        let args = ["--web.config.file", &self.text("web.yml"), "--token-file", &self.text("token")];
        Agent::start_when(Layout::Machine, Agent::command(Some(sim))?, &args, &|port| {
            self.curl(port, "/readyz", &[]).is_ok_and(|reply| reply.status == 200)
        })
    }

    /// To which a certificate alone gives access.
    fn agent_with_certificates(&self, sim: &Sim) -> Result<Agent> {
        let args = ["--web.config.file", &self.text("certificates.yml")];
        let certificate = self.certificate("client");
        Agent::start_when(Layout::Machine, Agent::command(Some(sim))?, &args, &|port| {
            let reply = self.curl(port, "/readyz", &certificate.each_ref().map(String::as_str));
            reply.is_ok_and(|reply| reply.status == 200)
        })
    }

    /// curl's arguments for a client certificate.
    fn certificate(&self, name: &str) -> [String; 4] {
        ["--cert".to_owned(), self.text(&format!("{name}.pem")), "--key".to_owned(), self.text(&format!("{name}.key"))]
    }

    fn curl(&self, port: u16, path: &str, args: &[&str]) -> Result<Reply> {
        self.curl_at(&format!("https://127.0.0.1:{port}{path}"), args)
    }

    fn curl_at(&self, url: &str, args: &[&str]) -> Result<Reply> {
        let output = Command::new("curl")
            .args(["-sS", "--path-as-is", "-m", "20", "-w", "\n%{http_code}", "--cacert", &self.text("ca.pem"), url])
            .args(args)
            .output()
            .context("running curl")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (text, status) = text.rsplit_once('\n').context("curl prints the status")?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(Reply { status: status.parse()?, text: text.to_owned(), error })
    }

    /// Replaces a file as configuration management does, by a rename.
    fn replace(&self, name: &str, text: &str) -> Result<()> {
        std::fs::write(self.path("new"), text)?;
        Ok(std::fs::rename(self.path("new"), self.path(name))?)
    }
}

/// The page as the scraper with the token gets it.
fn scrape(setup: &Setup, agent: &Agent) -> Result<Vec<Sample>> {
    let reply = setup.curl(agent.port, "/metrics?collect[]=all", &["-g", "-H", &format!("Authorization: Bearer {TOKEN}")])?;
    ensure!(reply.status == 200, "{reply:?}");
    Ok(parse(&reply.text))
}

#[test]
fn prometheus_scrapes_with_a_certificate_a_password_and_a_token() -> Result<()> {
    let (sim, setup) = (Sim::new("[[gpus]]")?, Setup::new()?);
    let (agent, by_certificate) = (setup.agent(&sim)?, setup.agent_with_certificates(&sim)?);
    let jobs = SHIPPED
        .replacen("127.0.0.1:9836", &format!("127.0.0.1:{}", by_certificate.port), 1)
        .replace("127.0.0.1:9836", &format!("127.0.0.1:{}", agent.port))
        .replace("/etc/prometheus/gpu-sampler", &setup.dir.path().display().to_string());
    let server =
        PrometheusServer::configured(&format!("global: {{scrape_interval: 1s}}\nscrape_configs:\n{jobs}"), "groups: []")?;
    for job in ["certificate", "password", "token"] {
        wait_for(&format!("the job with a {job} has scraped"), Duration::from_secs(30), || {
            let query = format!("gpu_sampler_build_info{{job=\"gpu-sampler-{job}\"}}");
            Ok((server.query(&query)?.len() == 1).then_some(()))
        })?;
    }
    let page = scrape(&setup, &agent)?;
    let rejected = sum(&page, "gpu_sampler_http_rejections_total", &[]);
    ensure!(rejected == Some(0.0), "{rejected:?} requests were rejected");
    // The kubelet's way: https and bearer.
    let reply = setup.curl(agent.port, "/metrics/cadvisor", &["-H", &format!("Authorization: Bearer {TOKEN}")])?;
    ensure!(reply.status == 200, "{reply:?}");
    Ok(())
}

#[test]
fn every_request_without_valid_credentials_is_rejected_with_a_clear_answer() -> Result<()> {
    let (sim, setup) = (Sim::new("[[gpus]]")?, Setup::new()?);
    let agent = setup.agent(&sim)?;
    let header = |value: &str| ["-H".to_owned(), format!("Authorization: {value}")];
    let user = |text: &str| ["-u".to_owned(), text.to_owned()];
    let none: &[String] = &[];
    for (args, path, status, expect) in [
        // With users, a certificate does not replace the password.
        (&setup.certificate("client")[..], "/metrics", 401, "user and password"),
        (&user(&format!("prometheus:{PASSWORD}")), "/metrics", 200, "gpu_sampler_build_info"),
        (&header(&format!("Bearer {TOKEN}")), "/metrics", 200, "gpu_sampler_build_info"),
        (none, "/healthz", 200, "ok"),
        (none, "/readyz", 200, "ready"),
        (none, "/metrics", 401, "unauthorized: send `Authorization: Bearer TOKEN`"),
        (none, "/", 401, "user and password"),
        (none, "/api/v1/live", 401, "a client certificate"),
        (&header("Bearer wrong"), "/metrics", 401, "the bearer token is not in the token file"),
        (&header("Bearer"), "/metrics", 401, "unauthorized: send"),
        (&user("prometheus:wrong"), "/metrics", 401, "wrong user name or password"),
        (&user("nemo:wrong"), "/metrics", 401, "wrong user name or password"),
        // Path tricks: what is open does not open anything else.
        (none, "/healthz/../metrics", 401, "unauthorized"),
        (none, "/healthz/", 401, "unauthorized"),
        (none, "//healthz", 401, "unauthorized"),
        (none, "/healthz%2f..%2fmetrics", 401, "unauthorized"),
        (none, "/%68ealthz", 401, "unauthorized"),
        (none, "/healthz;/metrics", 401, "unauthorized"),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let reply = setup.curl(agent.port, path, &args)?;
        ensure!(
            reply.status == status && reply.text.contains(expect),
            "{path} {args:?}: expected {status} with {expect:?}: {reply:?}"
        );
    }
    for name in ["expired", "stranger"] {
        let args = setup.certificate(name);
        let reply = setup.curl(agent.port, "/metrics", &args.each_ref().map(String::as_str))?;
        ensure!(reply.status == 0 && reply.error.contains("alert"), "{name}: {reply:?}");
    }
    let strict = setup.agent_with_certificates(&sim)?;
    let args = setup.certificate("client");
    let reply = setup.curl(strict.port, "/metrics", &args.each_ref().map(String::as_str))?;
    ensure!(reply.status == 200 && reply.text.contains("gpu_sampler_build_info"), "{reply:?}");
    let without = setup.curl(strict.port, "/healthz", &[])?;
    ensure!(without.status == 0 && without.error.contains("alert"), "{without:?}");
    let plain = setup.curl_at(&format!("http://127.0.0.1:{}/metrics", agent.port), &[])?;
    ensure!(plain.status == 400 && plain.text.contains("use https://"), "{plain:?}");
    let log = agent.log()?;
    for (reason, expect) in [("unauthorized", 1), ("tls_handshake", 1), ("plain_http", 1), ("foreign_host", 0)] {
        let lines = log.lines().filter(|line| line.contains("HTTP client rejected") && line.contains(reason)).count();
        ensure!(lines == expect, "{lines} lines of {reason}, not {expect}: {log}");
    }
    let page = scrape(&setup, &agent)?;
    let count = |reason: &str| sum(&page, "gpu_sampler_http_rejections_total", &[("reason", reason)]);
    ensure!(
        count("tls_handshake") == Some(2.0) && count("plain_http") == Some(1.0),
        "{:?}",
        [count("tls_handshake"), count("plain_http")]
    );
    // The 8 with wrong or no credentials, and the 6 path tricks.
    ensure!(count("unauthorized") == Some(14.0), "{:?}", count("unauthorized"));
    Ok(())
}

#[test]
fn certificates_tokens_and_users_are_replaced_while_serving() -> Result<()> {
    let (sim, setup) = (Sim::new("[[gpus]]")?, Setup::new()?);
    let agent = setup.agent(&sim)?;
    let bearer = |token: &str| setup.curl(agent.port, "/metrics", &["-H", &format!("Authorization: Bearer {token}")]);
    let until = |what: &str, is_there: &dyn Fn(&Reply) -> bool, token: &str| {
        let mut last = None;
        let found = wait_for(what, Duration::from_secs(20), || {
            let reply = bearer(token)?;
            let found = is_there(&reply);
            last = Some(reply);
            Ok(found.then_some(()))
        });
        found.with_context(|| format!("{last:?}"))?;
        last.context("no reply")
    };
    setup.replace("token", "")?;
    let refused = until("no token is valid", &|reply| reply.status == 401, TOKEN)?;
    ensure!(
        refused.text.contains("no bearer token is valid at present") && refused.text.contains("contains no token"),
        "{refused:?}"
    );
    setup.replace("token", "another\nand-a-third\n")?;
    until("the new token is valid", &|reply| reply.status == 200, "another")?;
    ensure!(bearer("and-a-third")?.status == 200 && bearer(TOKEN)?.status == 401);
    // A certificate of another authority: clients that trust the old one refuse it.
    let successor = Authority::new()?;
    successor.issue(setup.dir.path(), "server", Validity::Valid)?;
    until("the new certificate is served", &|reply| reply.status == 0, "another")?;
    successor.write(&setup.path("ca.pem"))?;
    until("the new authority is trusted", &|reply| reply.status == 200, "another")?;
    // Half of a pair: the previous one stays in force.
    let key = std::fs::read_to_string(setup.path("server.key"))?;
    setup.replace("server.key", &std::fs::read_to_string(setup.path("client.key"))?)?;
    wait_for("the mistake is reported", Duration::from_secs(20), || {
        ensure!(bearer("another")?.status == 200);
        Ok(agent.log()?.contains("the private key does not belong to the certificate").then_some(()))
    })?;
    let page = parse(&bearer("another")?.text);
    ensure!(sum(&page, "gpu_sampler_degraded", &[("condition", "web-config")]) == Some(1.0));
    setup.replace("server.key", &key)?;
    wait_for("the pair is complete again", Duration::from_secs(20), || {
        ensure!(bearer("another")?.status == 200);
        Ok(agent.log()?.contains("the web configuration is valid again").then_some(()))
    })?;
    // An expired certificate is served, and reported.
    successor.issue(setup.dir.path(), "server", Validity::Expired)?;
    wait_for("the expired certificate is reported", Duration::from_secs(20), || {
        let _refused = bearer("another")?;
        Ok(agent.log()?.contains("the certificate of the HTTP server has expired").then_some(()))
    })?;
    Ok(())
}

#[test]
fn hangup_reads_the_settings_again_and_says_what_needs_a_restart() -> Result<()> {
    let (sim, dir) = (Sim::new("[[gpus]]")?, tempfile::tempdir()?);
    let file = dir.path().join("config.toml");
    std::fs::write(&file, "collect = ['default']\n")?;
    let agent = Agent::start(Some(&sim), &["--config", &file.display().to_string()])?;
    let has = |family: &str| anyhow::Ok(agent.page()?.contains(&format!("# TYPE {family} ")));
    let hang_up = || Command::new("kill").args(["-HUP", &agent.process.0.id().to_string()]).status();
    ensure!(!has("gpu_sampler_nvml_call_seconds")?, "the collector is on by default: choose another one");
    std::fs::write(&file, "collect = ['default', 'calls']\nkernel_ring_bytes = 8192\n")?;
    ensure!(hang_up()?.success());
    wait_for("the collector is on", Duration::from_secs(20), || Ok(has("gpu_sampler_nvml_call_seconds")?.then_some(())))?;
    wait_for("the other setting is named", Duration::from_secs(20), || {
        let log = agent.log()?;
        Ok((log.contains("take effect after a restart") && log.contains("kernel_ring_bytes")).then_some(()))
    })?;
    std::fs::write(&file, "collect = ['nothing']\n")?;
    ensure!(hang_up()?.success());
    wait_for("the mistake is reported", Duration::from_secs(20), || {
        Ok(agent.log()?.contains("the previous settings stay in force").then_some(()))
    })?;
    ensure!(has("gpu_sampler_nvml_call_seconds")?);
    Ok(())
}

#[test]
fn commands_reach_an_agent_with_tls_and_users() -> Result<()> {
    let (sim, setup) = (Sim::new("[[gpus]]")?, Setup::new()?);
    let agent = setup.agent(&sim)?;
    let strict = setup.agent_with_certificates(&sim)?;
    let strict_url = format!("https://127.0.0.1:{}", strict.port);
    let url = format!("https://127.0.0.1:{}", agent.port);
    let (listen, web, token) = (format!("127.0.0.1:{}", agent.port), setup.text("web.yml"), setup.text("token"));
    let (ca, pem, key, password) =
        (setup.text("ca.pem"), setup.text("client.pem"), setup.text("client.key"), setup.text("password"));
    let by_user = ["--agent", &url, "--ca-file", &ca, "--user", "prometheus", "--password-file", &password];
    let by_certificate = ["--agent", &strict_url, "--ca-file", &ca, "--cert-file", &pem, "--key-file", &key];
    let local = ["--listen", &listen, "--web.config.file", &web, "--token-file", &token];
    for access in [&by_user[..], &by_certificate, &local] {
        let (code, out, error) = run_cli(&[&["top", "--once"], access].concat())?;
        ensure!(code == Some(0) && out.contains("GPU-SECONDS"), "{access:?}: {out}{error}");
    }
    for (access, expect) in [
        (&["--agent", &url][..], "--ca-file FILE"),
        (&["--agent", &url, "--ca-file", &pem], "TLS handshake failed"),
        (&["--agent", &url, "--ca-file", &ca], "401"),
        (&["--agent", &url.replace("https", "http"), "--ca-file", &ca], "use https://"),
    ] {
        let (code, _, error) = run_cli(&[&["top", "--once"], access].concat())?;
        ensure!(code == Some(1) && error.contains(expect), "{access:?}: {error}");
    }
    Ok(())
}

/// Connections that send nothing, or a byte now and then.
fn idle_connections(port: u16, n: usize, first: &[u8]) -> Result<Vec<TcpStream>> {
    let connect = |_| {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.write_all(first)?;
        Ok(stream)
    };
    (0..n).map(connect).collect()
}

#[test]
fn floods_and_slow_clients_delay_neither_scrapes_nor_samples() -> Result<()> {
    let (sim, setup) = (Sim::new("[[gpus]]")?, Setup::new()?);
    let agent = setup.agent(&sim)?;
    let _load = sim.load(std::process::id(), 0, 0.5, &[])?;
    let seconds = |page: &[Sample], state: &str| sum(page, "gpu_time_seconds_total", &[("state", state)]).unwrap_or_default();
    wait_for("the GPU is busy", Duration::from_secs(20), || Ok((seconds(&scrape(&setup, &agent)?, "busy") > 0.5).then_some(())))?;
    let before = scrape(&setup, &agent)?;
    let mut held = idle_connections(agent.port, 1000, b"")?;
    scrape(&setup, &agent).context("with 1,000 idle connections")?;
    // A record of a handshake that never ends.
    held.extend(idle_connections(agent.port, 100, &[0x16, 3, 1, 2, 0])?);
    for stream in held.iter_mut().rev().take(100) {
        // Connections that gave their place to others are closed.
        let _closed = stream.write_all(&[1]);
    }
    scrape(&setup, &agent).context("with 100 handshakes that do not end")?;
    for _ in 0..40 {
        let _refused = setup.curl(agent.port, "/metrics", &["-u", "prometheus:wrong"])?;
    }
    let flooded = setup.curl(agent.port, "/metrics", &["-u", "prometheus:wrong"])?;
    ensure!([401, 429].contains(&flooded.status), "{flooded:?}");
    let body = setup.path("body");
    std::fs::File::create(&body)?.set_len(100 << 20)?;
    let large = ["-X", "POST", "-H", "Content-Type: application/json", "-H", "Expect:", "--data-binary"];
    let post = |header: &str| {
        setup.curl(agent.port, "/api/v1/sessions", &[&large[..], &[&format!("@{}", body.display()), "-H", header]].concat())
    };
    let refused = post(&format!("Authorization: Bearer {TOKEN}"))?;
    ensure!(refused.status == 413 && refused.text.contains("at most"), "{refused:?}");
    let unauthorized = post("X-None: 1")?;
    ensure!(unauthorized.status == 401, "{unauthorized:?}");
    // The first of the idle connections gave their place to others.
    held[0].set_read_timeout(Some(Duration::from_secs(1)))?;
    ensure!(held[0].read(&mut [0]).is_ok_and(|read| read == 0), "the oldest idle connection is still open");
    // A quick machine is done with all that within a second.
    let after = wait_for("a second of GPU time since the flood began", Duration::from_secs(20), || {
        let page = scrape(&setup, &agent)?;
        Ok((seconds(&page, "busy") - seconds(&before, "busy") > 1.0).then_some(page))
    })?;
    ensure!(sum(&after, "gpu_sampler_sample_gaps_total", &[]) == Some(0.0), "samples were missed");
    let unobserved_s = seconds(&after, "unobserved") - seconds(&before, "unobserved");
    ensure!(unobserved_s < 0.01, "unobserved {unobserved_s} s");
    println!("busy {:.1} s, unobserved {unobserved_s:.3} s", seconds(&after, "busy") - seconds(&before, "busy"));
    Ok(())
}

/// Files of other users, and files that are not files.
#[test]
fn unusable_files_are_refused_at_the_start() -> Result<()> {
    let setup = Setup::new()?;
    let rejects = |args: &[&str], expect: &str| {
        let (code, _, error) = run_cli(&[&["run", "--listen", "0.0.0.0:0"], args].concat())?;
        ensure!(code == Some(1) && error.contains(expect), "{args:?}: {error}");
        anyhow::Ok(())
    };
    let write = |name: &str, text: &str| anyhow::Ok(std::fs::write(setup.path(name), text).map(|()| setup.text(name))?);
    let tls_alone = write("tls.yml", "tls_server_config: {cert_file: server.pem, key_file: server.key}")?;
    rejects(&["--web.config.file", &tls_alone], "no credentials are configured")?;
    rejects(&["--web.config.file", &write("list.yml", "- a")?], "web configuration")?;
    rejects(&["--web.config.file", "/"], "cannot read the web configuration /")?;
    rejects(&["--token-file", &write("empty", "\n")?], "the file contains no token")?;
    rejects(&["--token-file", Path::new("/dev/zero").to_str().unwrap_or_default()], "cannot read the token file /dev/zero")?;
    Ok(())
}
