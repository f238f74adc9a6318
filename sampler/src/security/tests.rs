//! The rules of files that are written and changed here.

use std::collections::HashSet;

use axum::http::HeaderValue;
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

use super::*;

struct SecurityFolder {
    folder: TempDir,
}

impl SecurityFolder {
    fn new() -> Self {
        let this = Self { folder: TempDir::new().unwrap() };
        this.certificate("server");
        this.write("token", "first\nsecond\n");
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        // By a rename, so that the file is another one.
        let new = self.path("new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.path(name)).unwrap();
    }

    fn certificate(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn load(&self, web: &str) -> Result<WebRules, SecurityError> {
        self.write("web.yml", web);
        WebRules::load(&self.path("web.yml"), &mut FileStates::default())
    }

    fn security(&self) -> Arc<Security> {
        let files = SecurityFiles { token_file: Some(self.path("token")), web_config_file: Some(self.path("web.yml")) };
        Security::new(files, Arc::default(), || WallTime(0)).unwrap()
    }
}

const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
const TLS: &str = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n";

fn bcrypt_hash() -> String {
    bcrypt::hash("secret", 4).unwrap()
}

#[test]
fn web_configurations_of_exporter_toolkit_are_read() {
    let files = SecurityFolder::new();
    let hash = bcrypt_hash();
    let rules = files
        .load(&format!(
            "{TLS}  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: server.pem\n  client_allowed_sans: [prometheus]\n  \
             min_version: TLS12\n  max_version: TLS13\n  prefer_server_cipher_suites: true\n  cipher_suites:\n    - \
             TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\n  curve_preferences: [CurveP256, X25519]\nhttp_server_config:\n  http2: true\n  \
             headers:\n    Strict-Transport-Security: max-age=3600\nrate_limit:\n  burst: 10\n  interval: 5ms\nbasic_auth_users:\n  \
             prometheus: {hash}\n"
        ))
        .unwrap();
    let tls = rules.tls.as_ref().unwrap();
    assert!(tls.verifies_clients && tls.requires_certificate);
    assert_eq!(rules.users.len(), 1);
    assert!(rules.rate_limit.is_some() && rules.has_credentials());
    assert_eq!(rules.headers, [(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=3600"))]);
    assert!(files.load("").unwrap().tls.is_none());
    let (certificate, key) = (files.path("server.pem"), files.path("server.key"));
    let indented =
        |path: PathBuf| std::fs::read_to_string(path).unwrap().lines().map(|line| format!("    {line}\n")).collect::<String>();
    let inline = format!("tls_server_config:\n  cert: |\n{}  key: |\n{}", indented(certificate), indented(key));
    assert!(files.load(&inline).unwrap().tls.is_some());
}

#[test]
fn invalid_web_configurations_are_refused_with_the_key_and_the_remedy() {
    let files = SecurityFolder::new();
    files.certificate("other");
    files.write("empty.pem", "");
    for (text, expect) in [
        ("tls_server_config: 3", "web.yml is invalid"),
        ("tls_server_confg:\n  cert_file: x", "tls_server_confg"),
        ("tls_server_config: {}", "tls_server_config.cert_file: set it to a PEM file"),
        ("tls_server_config: {cert_file: none.pem, key_file: server.key}", "cannot read the certificate"),
        ("tls_server_config: {cert_file: empty.pem, key_file: server.key}", "it contains no certificate"),
        ("tls_server_config: {cert_file: server.key, key_file: server.key}", "it contains no certificate"),
        ("tls_server_config: {cert_file: server.pem, key_file: server.pem}", "no private key can be read"),
        ("tls_server_config: {cert_file: server.pem, key_file: other.key}", "the private key does not belong to the certificate"),
        ("tls_server_config: {cert_file: server.pem, key_file: server.key, cert: x}", "set cert or cert_file, not both"),
        ("basic_auth_users: {a: secret}", "basic_auth_users: the value of \"a\" is not a bcrypt hash"),
        ("http_server_config: {headers: {X-Other: a}}", "choose from Content-Security-Policy"),
        ("rate_limit: {interval: fast}", "\"fast\" is not a duration"),
    ] {
        let error = files.load(text).unwrap_err().to_string();
        assert!(error.contains(expect), "{text}: {error}");
    }
    for (keys, expect) in [
        ("client_auth_type: RequireAndVerifyClientCert", "needs client_ca_file"),
        ("client_auth_type: Sometimes", "\"Sometimes\" is unknown; choose from NoClientCert, RequestClientCert"),
        ("client_ca_file: server.pem", "NoClientCert does not use client_ca_file"),
        ("client_auth_type: RequireAnyClientCert\n  client_allowed_sans: [a]", "prove nothing"),
        ("min_version: TLS14", "choose TLS12 or TLS13"),
        ("min_version: TLS13\n  max_version: TLS12", "it is lower than min_version"),
        ("cipher_suites: [TLS_RSA_WITH_AES_128_CBC_SHA]", "TLS_RSA_WITH_AES_128_CBC_SHA is not supported; choose from TLS_"),
        ("curve_preferences: [CurveP521]", "choose from CurveP256"),
    ] {
        let error = files.load(&format!("{TLS}  {keys}\n")).unwrap_err().to_string();
        assert!(error.contains(expect), "{keys}: {error}");
    }
}

fn bearer(token: &str) -> HeaderMap {
    HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap())])
}

#[tokio::test]
async fn tokens_are_replaced_and_a_file_without_one_revokes_all() {
    let files = SecurityFolder::new();
    files.write("web.yml", TLS);
    let security = files.security();
    let accepts = async |token: &str| {
        security.check();
        security.rules().authorize(&bearer(token), false, PEER).await
    };
    assert_eq!(accepts("first").await, Ok(Credential::Token));
    assert_eq!(accepts("second").await, Ok(Credential::Token));
    assert_eq!(accepts("third").await, Err(Unauthorized::WrongToken));
    files.write("token", "third\n");
    assert_eq!(accepts("third").await, Ok(Credential::Token));
    assert_eq!(accepts("first").await, Err(Unauthorized::WrongToken));
    for text in [Some(""), None] {
        match text {
            Some(text) => files.write("token", text),
            None => std::fs::remove_file(files.path("token")).unwrap(),
        }
        let refused = accepts("third").await.unwrap_err();
        assert!(matches!(refused, Unauthorized::NoTokens(_)), "{refused}");
        assert_eq!(security.health.view().degraded[0].0, Condition::TokenFile);
    }
    files.write("token", "third\n");
    assert_eq!(accepts("third").await, Ok(Credential::Token));
    assert!(security.health.view().degraded.is_empty());
    assert!(matches!(security.rules().authorize(&HeaderMap::new(), false, PEER).await, Err(Unauthorized::NoCredentials(_))));
}

#[tokio::test]
async fn a_certificate_suffices_unless_every_client_has_one_and_a_login_is_configured() {
    let files = SecurityFolder::new();
    for (auth, has_tokens, expect) in [
        ("RequireAndVerifyClientCert", false, true),
        ("RequireAndVerifyClientCert", true, false),
        ("VerifyClientCertIfGiven", false, true),
        ("VerifyClientCertIfGiven", true, true),
    ] {
        let web = files.load(&format!("{TLS}  client_auth_type: {auth}\n  client_ca_file: server.pem\n")).unwrap();
        let tokens = if has_tokens { Tokens::load(&files.path("token")).unwrap() } else { Tokens::default() };
        let rules = Rules { tokens: Arc::new(tokens), web: Arc::new(web), ..Rules::default() };
        assert_eq!(rules.authorize(&HeaderMap::new(), true, PEER).await.is_ok(), expect, "{auth} {has_tokens}");
        assert!(rules.authorize(&HeaderMap::new(), false, PEER).await.is_err());
    }
}

#[test]
fn a_new_certificate_is_used_and_an_invalid_configuration_changes_nothing() {
    let files = SecurityFolder::new();
    let web = format!("{TLS}basic_auth_users:\n  a: {}\n", bcrypt_hash());
    files.write("web.yml", &web);
    let security = files.security();
    let mut servers = HashSet::new();
    let mut step = |changes: &dyn Fn(), is_new: bool, generation: u64, is_degraded: bool| {
        changes();
        security.check();
        let rules = security.rules();
        let server = Arc::as_ptr(&rules.tls().unwrap().server).addr();
        assert_eq!(servers.insert(server), is_new);
        // A server that was dropped must not have its address used again.
        std::mem::forget(Arc::clone(&rules.tls().unwrap().server));
        assert_eq!((rules.generation, !security.health.view().degraded.is_empty()), (generation, is_degraded));
    };
    step(&|| (), true, 0, false);
    step(&|| files.certificate("server"), true, 1, false);
    // The certificate and the key are written one after the other.
    let key = KeyPair::generate().unwrap().serialize_pem();
    step(&|| files.write("server.key", &key), false, 1, true);
    step(&|| files.certificate("server"), true, 2, false);
    step(&|| files.write("web.yml", "basic_auth_users: {a: b}"), false, 2, true);
    // Valid, and half of the file.
    step(&|| files.write("web.yml", TLS), false, 2, true);
    step(&|| files.write("web.yml", ""), false, 2, true);
    step(&|| files.write("web.yml", &web), true, 3, false);
}

#[test]
fn a_configuration_that_would_open_the_server_is_refused() {
    let files = SecurityFolder::new();
    files.write("web.yml", &format!("basic_auth_users:\n  a: {}\n", bcrypt_hash()));
    let security =
        Security::new(SecurityFiles { token_file: None, web_config_file: Some(files.path("web.yml")) }, Arc::default(), || {
            WallTime(0)
        })
        .unwrap();
    files.write("web.yml", "");
    security.check();
    assert!(security.rules().have_credentials());
    assert!(security.health.view().degraded[0].1.contains("has no users any more"));
}
