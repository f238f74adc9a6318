//! Sends requests to a receiver: gRPC, or protobuf over HTTP.

use std::path::Path;

use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use prost::Message as _;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use thiserror::Error;
use tonic::codec::CompressionEncoding;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::settings::{OtlpSettings, Protocol};

const MAX_MESSAGE_CHARS: usize = 200;

#[derive(Debug, Error)]
pub enum OtlpError {
    #[error("cannot read {path}", path = path.display())]
    Read { path: std::path::PathBuf, source: std::io::Error },
    #[error("the header {0:?} is invalid")]
    Header(String),
    #[error("the exporter cannot be set up")]
    Http(#[source] reqwest::Error),
    #[error("the exporter cannot be set up")]
    Grpc(#[source] tonic::transport::Error),
    #[error("the receiver cannot be reached")]
    Unreachable(#[source] reqwest::Error),
    #[error("the receiver returned HTTP {status}: {message}")]
    Refused { status: u16, message: String },
    #[error("the receiver returned {code}: {message}")]
    Status { code: tonic::Code, message: String },
}

/// A connection is made with the first request and again after failures.
pub enum Transport {
    Http { client: reqwest::Client, endpoint: String },
    Grpc { client: Box<MetricsServiceClient<Channel>>, headers: MetadataMap, timeout: std::time::Duration },
}

fn read(path: &Path) -> Result<Vec<u8>, OtlpError> {
    std::fs::read(path).map_err(|source| OtlpError::Read { path: path.to_owned(), source })
}

impl Transport {
    pub fn new(settings: &OtlpSettings) -> Result<Self, OtlpError> {
        // The HTTP client takes the one of the process. An error means that there is one already.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        match settings.protocol {
            Protocol::HttpProtobuf => Self::http(settings),
            Protocol::Grpc => Self::grpc(settings),
        }
    }

    fn http(settings: &OtlpSettings) -> Result<Self, OtlpError> {
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"))]);
        for (name, value) in &settings.headers {
            let pair = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
            let (name, value) = pair.ok_or_else(|| OtlpError::Header(name.clone()))?;
            headers.insert(name, value);
        }
        let mut client = reqwest::Client::builder().default_headers(headers).timeout(settings.timeout);
        if let Some(path) = &settings.ca_file {
            let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?).map_err(OtlpError::Http)?;
            client = client.tls_certs_only(certificates);
        }
        if let Some((certificate, key)) = &settings.client {
            let pem = [read(certificate)?, read(key)?].concat();
            client = client.identity(reqwest::Identity::from_pem(&pem).map_err(OtlpError::Http)?);
        }
        if settings.is_compressed {
            tracing::warn!("requests to the OTLP receiver are not compressed: over HTTP that is not supported");
        }
        let client = client.build().map_err(OtlpError::Http)?;
        Ok(Self::Http { client, endpoint: settings.endpoint.clone() })
    }

    fn grpc(settings: &OtlpSettings) -> Result<Self, OtlpError> {
        let mut endpoint = Endpoint::from_shared(settings.endpoint.clone()).map_err(OtlpError::Grpc)?;
        endpoint = endpoint.timeout(settings.timeout).connect_timeout(settings.timeout);
        if settings.endpoint.starts_with("https://") {
            let mut tls = ClientTlsConfig::new().with_native_roots();
            if let Some(path) = &settings.ca_file {
                tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?));
            }
            if let Some((certificate, key)) = &settings.client {
                tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            endpoint = endpoint.tls_config(tls).map_err(OtlpError::Grpc)?;
        }
        let mut headers = MetadataMap::new();
        for (name, value) in &settings.headers {
            let key = MetadataKey::from_bytes(name.to_lowercase().as_bytes()).ok();
            let (key, value) = key.zip(MetadataValue::try_from(value).ok()).ok_or_else(|| OtlpError::Header(name.clone()))?;
            headers.insert(key, value);
        }
        let mut client = MetricsServiceClient::new(endpoint.connect_lazy());
        if settings.is_compressed {
            client = client.send_compressed(CompressionEncoding::Gzip);
        }
        Ok(Self::Grpc { client: Box::new(client), headers, timeout: settings.timeout })
    }

    pub async fn send(&mut self, request: ExportMetricsServiceRequest) -> Result<(), OtlpError> {
        match self {
            Self::Http { client, endpoint } => {
                let sent = client.post(endpoint.as_str()).body(request.encode_to_vec()).send().await;
                let response = sent.map_err(OtlpError::Unreachable)?;
                let status = response.status();
                if status.is_success() {
                    return Ok(());
                }
                let text = response.text().await.unwrap_or_default();
                let message = text.trim().chars().take(MAX_MESSAGE_CHARS).collect();
                Err(OtlpError::Refused { status: status.as_u16(), message })
            }
            Self::Grpc { client, headers, timeout } => {
                let mut request = tonic::Request::new(request);
                *request.metadata_mut() = headers.clone();
                request.set_timeout(*timeout);
                let exported = client.export(request).await;
                exported.map(drop).map_err(|status| OtlpError::Status {
                    code: status.code(),
                    message: status.message().chars().take(MAX_MESSAGE_CHARS).collect(),
                })
            }
        }
    }
}
