//! The TLS of the server, from the keys of `tls_server_config`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    SupportedProtocolVersion, version,
};
use sampler_core::units::WallTime;
use serde::Deserialize;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::error::{InvalidKey, SecurityError, read_file};
use super::file_states::FileStates;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    cert_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    cert: Option<String>,
    key: Option<String>,
    client_auth_type: Option<String>,
    client_ca_file: Option<PathBuf>,
    client_ca: Option<String>,
    client_allowed_sans: Vec<String>,
    min_version: Option<String>,
    max_version: Option<String>,
    cipher_suites: Vec<String>,
    /// The order of the server is always preferred.
    #[serde(rename = "prefer_server_cipher_suites")]
    _prefer_server_cipher_suites: Option<bool>,
    curve_preferences: Vec<String>,
}

/// Whether clients show a certificate, in the words of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::VariantNames)]
enum ClientAuth {
    NoClientCert,
    RequestClientCert,
    #[strum(to_string = "RequireAnyClientCert", serialize = "RequireClientCert")]
    RequireAnyClientCert,
    VerifyClientCertIfGiven,
    RequireAndVerifyClientCert,
}

impl ClientAuth {
    fn verifies(self) -> bool {
        matches!(self, Self::VerifyClientCertIfGiven | Self::RequireAndVerifyClientCert)
    }

    fn requires(self) -> bool {
        matches!(self, Self::RequireAnyClientCert | Self::RequireAndVerifyClientCert)
    }
}

/// TLS of the server, ready for use.
#[derive(Debug)]
pub struct Tls {
    pub server: Arc<ServerConfig>,
    /// A certificate that a client shows is verified, so it is a credential.
    pub verifies_clients: bool,
    /// Every client shows one.
    pub requires_certificate: bool,
    /// When the server's certificate expires.
    pub expires: WallTime,
    clients: Option<Arc<ClientCertificates>>,
}

impl TlsSettings {
    /// The certificate of the server as PEM, without its key.
    pub fn certificate(&self, folder: &Path) -> Result<Option<String>, SecurityError> {
        match &self.cert_file {
            Some(file) => read_file("the certificate", &folder.join(file)).map(Some),
            None => Ok(self.cert.clone()),
        }
    }
}

impl Tls {
    pub fn new(
        settings: TlsSettings,
        folder: &Path,
        read: &mut FileStates,
        invalid: InvalidKey<'_>,
    ) -> Result<Self, SecurityError> {
        let mut source = |what: &'static str, key: &str, file: Option<PathBuf>, text: Option<String>| match (
            file.filter(|file| !file.as_os_str().is_empty()),
            text.filter(|text| !text.is_empty()),
        ) {
            (Some(_), Some(_)) => Err(invalid(&format!("tls_server_config.{key}"), format!("set {key} or {key}_file, not both"))),
            (Some(file), None) => {
                let path = folder.join(file);
                read.add(&path);
                read_file(what, &path).map(|text| Some((text, path.display().to_string())))
            }
            (None, Some(text)) => Ok(Some((text, format!("tls_server_config.{key}")))),
            (None, None) => Ok(None),
        };
        let certificate = source("the certificate", "cert", settings.cert_file, settings.cert)?;
        let key = source("the private key", "key", settings.key_file, settings.key)?;
        let authority = source("the certificates of the client CA", "client_ca", settings.client_ca_file, settings.client_ca)?;
        let missing = |key: &str| invalid(&format!("tls_server_config.{key}_file"), "set it to a PEM file".into());
        let (certificate, key) = (certificate.ok_or_else(|| missing("cert"))?, key.ok_or_else(|| missing("key"))?);
        let chain = certificates(&certificate.0, &certificate.1)?;
        let key_der = private_key(&key.0, &key.1)?;
        let expires = expiry(&chain).ok_or_else(|| pem(&certificate.1, "it is not an X.509 certificate"))?;
        let auth = client_auth(settings.client_auth_type.as_deref(), authority.is_some(), invalid)?;
        let provider = Arc::new(provider(&settings.cipher_suites, &settings.curve_preferences, invalid)?);
        let versions = versions(settings.min_version.as_deref(), settings.max_version.as_deref(), invalid)?;
        let broken = |error: rustls::Error| invalid("tls_server_config", tls_problem(&error));
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&versions).map_err(broken)?;
        let clients = if auth == ClientAuth::NoClientCert {
            None
        } else {
            let roots = authority.filter(|_| auth.verifies()).map(|(text, place)| certificates(&text, &place)).transpose()?;
            Some(Arc::new(ClientCertificates::new(auth, roots, settings.client_allowed_sans, &provider, invalid)?))
        };
        let builder = match &clients {
            None => builder.with_no_client_auth(),
            Some(clients) => builder.with_client_cert_verifier(Arc::clone(clients) as Arc<dyn ClientCertVerifier>),
        };
        let mut server = builder.with_single_cert(chain, key_der).map_err(broken)?;
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        // A resumed session would not show the client's certificate again, which may have expired or lost its authority since.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let (verifies_clients, requires_certificate) = (auth.verifies(), auth.verifies() && auth.requires());
        Ok(Self { server: Arc::new(server), verifies_clients, requires_certificate, expires, clients })
    }

    /// Whether a client that showed these certificates earlier is verified by these settings now.
    pub fn verifies(&self, chain: &[CertificateDer<'_>]) -> bool {
        let (Some(clients), Some((first, rest))) = (&self.clients, chain.split_first()) else { return false };
        self.verifies_clients && clients.verify_client_cert(first, rest, UnixTime::now()).is_ok()
    }
}

fn pem(place: &str, problem: &str) -> SecurityError {
    SecurityError::Pem { place: place.to_owned(), problem: problem.to_owned() }
}

/// The certificates of a text in PEM, at least one. `place` is where it stands.
pub fn certificates(text: &str, place: &str) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
    let chain = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| pem(place, &format!("a certificate cannot be read ({error})")))?;
    if chain.is_empty() {
        return Err(pem(place, "it contains no certificate"));
    }
    Ok(chain)
}

/// The first private key of a text in PEM.
pub fn private_key(text: &str, place: &str) -> Result<PrivateKeyDer<'static>, SecurityError> {
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| pem(place, &format!("no private key can be read ({error})")))
}

fn expiry(chain: &[CertificateDer<'_>]) -> Option<WallTime> {
    let (_, certificate) = X509Certificate::from_der(chain.first()?).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(WallTime(seconds.saturating_mul(1_000_000_000)))
}

fn tls_problem(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => "the private key does not belong to the certificate".into(),
        error => error.to_string(),
    }
}

fn client_auth(name: Option<&str>, has_authority: bool, invalid: InvalidKey<'_>) -> Result<ClientAuth, SecurityError> {
    use strum::VariantNames as _;
    let key = "tls_server_config.client_auth_type";
    let auth = match name {
        None | Some("") => ClientAuth::NoClientCert,
        Some(name) => name
            .parse()
            .map_err(|_| invalid(key, format!("{name:?} is unknown; choose from {}", ClientAuth::VARIANTS.join(", "))))?,
    };
    if auth.verifies() && !has_authority {
        return Err(invalid(key, format!("{auth:?} needs client_ca_file, the CA that signs certificates of clients")));
    }
    if !auth.verifies() && has_authority {
        return Err(invalid(
            key,
            format!("{auth:?} does not use client_ca_file; set RequireAndVerifyClientCert, or remove the file"),
        ));
    }
    Ok(auth)
}

/// TLS 1.2 and 1.3 within these bounds, which are names such as `TLS12`.
fn versions(
    least: Option<&str>,
    most: Option<&str>,
    invalid: InvalidKey<'_>,
) -> Result<Vec<&'static SupportedProtocolVersion>, SecurityError> {
    let number = |key: &str, name: Option<&str>, default: u8| match name {
        None | Some("") => Ok(default),
        Some("TLS13") => Ok(13),
        Some("TLS12") => Ok(12),
        // Clients of these fail; a server that asked for them as the least offers more.
        Some("TLS11" | "TLS10") if key == "min_version" => Ok(12),
        Some(name) => {
            Err(invalid(&format!("tls_server_config.{key}"), format!("{name:?} is not supported; choose TLS12 or TLS13")))
        }
    };
    let (least, most) = (number("min_version", least, 12)?, number("max_version", most, 13)?);
    if least > most {
        return Err(invalid("tls_server_config.max_version", "it is lower than min_version".into()));
    }
    let all = [(12, &version::TLS12), (13, &version::TLS13)];
    Ok(all.into_iter().filter(|(number, _)| (least..=most).contains(number)).map(|(_, version)| version).collect())
}

/// With the chosen suites and curves, which have Go's names in the file. The suites of TLS 1.3 are always on, as in Go.
fn provider(suites: &[String], curves: &[String], invalid: InvalidKey<'_>) -> Result<CryptoProvider, SecurityError> {
    let mut provider = ring::default_provider();
    if !suites.is_empty() {
        let names: Vec<(String, rustls::SupportedCipherSuite)> =
            provider.cipher_suites.iter().map(|suite| (go_name(&format!("{:?}", suite.suite())), *suite)).collect();
        if let Some(unknown) = suites.iter().find(|name| !names.iter().any(|(known, _)| known == *name)) {
            let known: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
            let remedy = format!("{unknown} is not supported; choose from {}", known.join(", "));
            return Err(invalid("tls_server_config.cipher_suites", remedy));
        }
        let is_chosen = |(name, suite): &(String, rustls::SupportedCipherSuite)| suite.tls13().is_some() || suites.contains(name);
        provider.cipher_suites = names.into_iter().filter(is_chosen).map(|(_, suite)| suite).collect();
    }
    if !curves.is_empty() {
        let mut chosen = Vec::new();
        for name in curves {
            let group = match name.as_str() {
                "CurveP256" => ring::kx_group::SECP256R1,
                "CurveP384" => ring::kx_group::SECP384R1,
                "X25519" => ring::kx_group::X25519,
                other => {
                    let remedy = format!("{other} is not supported; choose from CurveP256, CurveP384, X25519");
                    return Err(invalid("tls_server_config.curve_preferences", remedy));
                }
            };
            chosen.push(group);
        }
        provider.kx_groups = chosen;
    }
    Ok(provider)
}

/// rustls names suites of TLS 1.3 `TLS13_..`.
fn go_name(name: &str) -> String {
    name.replacen("TLS13_", "TLS_", 1)
}

/// The certificates of clients: requested, and verified where the settings say so.
#[derive(Debug)]
struct ClientCertificates {
    auth: ClientAuth,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    /// If any are given, a certificate has at least one of them as subject alternative name.
    allowed_sans: Vec<String>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertificates {
    fn new(
        auth: ClientAuth,
        roots: Option<Vec<CertificateDer<'static>>>,
        allowed_sans: Vec<String>,
        provider: &Arc<CryptoProvider>,
        invalid: InvalidKey<'_>,
    ) -> Result<Self, SecurityError> {
        let key = "tls_server_config.client_ca_file";
        let verifier = match roots {
            None => None,
            Some(roots) => {
                let mut store = RootCertStore::empty();
                for root in roots {
                    store.add(root).map_err(|error| invalid(key, error.to_string()))?;
                }
                let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider));
                Some(builder.build().map_err(|error| invalid(key, error.to_string()))?)
            }
        };
        if verifier.is_none() && !allowed_sans.is_empty() {
            let remedy =
                "names of certificates that are not verified prove nothing; set client_auth_type: RequireAndVerifyClientCert";
            return Err(invalid("tls_server_config.client_allowed_sans", remedy.into()));
        }
        Ok(Self { auth, verifier, allowed_sans, algorithms: provider.signature_verification_algorithms })
    }

    fn is_allowed(&self, certificate: &CertificateDer<'_>) -> bool {
        self.allowed_sans.is_empty()
            || X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
                let names = certificate.extensions().iter().filter_map(|extension| match extension.parsed_extension() {
                    ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
                    _ => None,
                });
                names.flatten().filter_map(san).any(|name| self.allowed_sans.contains(&name))
            })
    }
}

/// A subject alternative name as text: DNS, address, URI or e-mail.
fn san(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) | GeneralName::URI(name) | GeneralName::RFC822Name(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|octets| std::net::IpAddr::from(octets).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|octets| std::net::IpAddr::from(octets).to_string()),
            _ => None,
        },
        _ => None,
    }
}

impl ClientCertVerifier for ClientCertificates {
    fn client_auth_mandatory(&self) -> bool {
        self.auth.requires()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.as_ref().map_or(&[], |verifier| verifier.root_hint_subjects())
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if let Some(verifier) = &self.verifier {
            verifier.verify_client_cert(end_entity, intermediates, now)?;
        }
        if !self.is_allowed(end_entity) {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What a server sends to a client that speaks plain HTTP on a port with TLS.
pub const PLAIN_HTTP: &str = concat!(
    "HTTP/1.0 400 Bad Request\r\nServer: gpu-sampler/",
    env!("CARGO_PKG_VERSION"),
    "\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n\
     Client sent an HTTP request to an HTTPS server: use https://\n",
);
