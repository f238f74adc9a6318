//! How a command reaches an agent: its address, what proves that it is that agent, and what proves that the command may use it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::config::Config;
use crate::security::credentials::read_tokens;
use crate::security::error::read_file;
use crate::security::tls::{certificates, private_key};
use crate::security::web_config::server_certificate;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Access to an agent with TLS or users")]
pub struct AccessArgs {
    /// Certificate of the agent, or of the CA that signed it (PEM), for an https:// address [default: that of --web.config.file]
    #[arg(long, value_name = "PATH")]
    ca_file: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long, value_name = "PATH", requires = "key_file")]
    cert_file: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(long, value_name = "PATH", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// User of the agent's web configuration
    #[arg(long, value_name = "NAME", requires = "password_file")]
    user: Option<String>,
    /// File with the password of the user
    #[arg(long, value_name = "PATH", requires = "user")]
    password_file: Option<PathBuf>,
}

/// An agent, and what is needed to use it.
#[derive(Clone, Debug)]
pub struct AgentAccess {
    /// `http://HOST:PORT` or `https://HOST:PORT`.
    pub url: String,
    /// Value of the header `Authorization`.
    pub authorization: Option<String>,
    pub tls: Option<Arc<ClientConfig>>,
}

impl AgentAccess {
    /// An agent without TLS and credentials.
    pub fn plain(url: String) -> Self {
        Self { url, authorization: None, tls: None }
    }
}

impl AccessArgs {
    /// `agent` is the address that was given; without it, the agent is the one that `config` configures.
    pub fn resolve(&self, agent: Option<&str>, config: &Config) -> anyhow::Result<AgentAccess> {
        let certificate = config.web_config_file.as_deref().map(server_certificate).transpose()?.flatten();
        let url = match agent {
            Some(agent) => agent.to_owned(),
            None => agent_at(config, certificate.is_some()),
        };
        let tls = url.starts_with("https://").then(|| self.tls(certificate.as_deref())).transpose()?;
        Ok(AgentAccess { url, authorization: self.authorization(config.token_file.as_deref())?, tls })
    }

    fn authorization(&self, token_file: Option<&Path>) -> anyhow::Result<Option<String>> {
        if let (Some(user), Some(file)) = (&self.user, &self.password_file) {
            let password = read_file("--password-file", file)?;
            let password = password.trim_end_matches(['\r', '\n']);
            return Ok(Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))));
        }
        let Some(file) = token_file else { return Ok(None) };
        Ok(read_tokens(file)?.first().map(|token| format!("Bearer {token}")))
    }

    fn tls(&self, configured: Option<&str>) -> anyhow::Result<Arc<ClientConfig>> {
        let trusted = match (&self.ca_file, configured) {
            (Some(file), _) => certificates(&read_file("--ca-file", file)?, &file.to_string_lossy())?,
            (None, Some(pem)) => certificates(pem, "the certificate of --web.config.file")?,
            (None, None) => bail!("an https:// agent needs --ca-file FILE: its certificate, or that of the CA that signed it"),
        };
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(TrustedAgent::new(trusted, provider)));
        let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) else {
            return Ok(Arc::new(builder.with_no_client_auth()));
        };
        let chain = certificates(&read_file("--cert-file", cert)?, &cert.to_string_lossy())?;
        let key = private_key(&read_file("--key-file", key)?, &key.to_string_lossy())?;
        Ok(Arc::new(builder.with_client_auth_cert(chain, key).context("--cert-file and --key-file do not belong together")?))
    }
}

/// The URL of the agent that this configuration starts; one that listens on all addresses is reachable on loopback.
fn agent_at(config: &Config, has_tls: bool) -> String {
    let mut listen = config.listen;
    if listen.ip().is_unspecified() {
        listen.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    format!("{}://{listen}", if has_tls { "https" } else { "http" })
}

/// Accepts the trusted certificates themselves, under every name, and those that they signed, under their names.
#[derive(Debug)]
struct TrustedAgent {
    trusted: Vec<CertificateDer<'static>>,
    authorities: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl TrustedAgent {
    fn new(trusted: Vec<CertificateDer<'static>>, provider: Arc<CryptoProvider>) -> Self {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(trusted.iter().cloned());
        let authorities = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider)).build().ok();
        Self { trusted, authorities, provider }
    }
}

impl ServerCertVerifier for TrustedAgent {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.trusted.iter().any(|trusted| trusted == end_entity) {
            return Ok(ServerCertVerified::assertion());
        }
        match &self.authorities {
            Some(authorities) => authorities.verify_server_cert(end_entity, intermediates, server_name, ocsp, now),
            None => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
