//! Object stores for session files: S3, Google Cloud Storage, Azure Blob Storage, and folders as `file://` URLs.
//!
//! Credentials come from the environment or from the metadata service of the machine, never from a URL. Every request is bounded in time;
//! files are read and written in parts, so that an upload needs the memory of one part.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path as FilePath;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _, RetryConfig, WriteMultipart};
use thiserror::Error;
use url::Url;

use crate::error::display_chain;

/// Size of the parts of an upload; smaller files are sent in one request. S3 requires at least 5 MiB.
const PART_BYTES: u64 = 8 << 20;
/// A listing with more objects is refused: it would not be the sessions of one job.
const MAX_OBJECTS: usize = 100_000;
/// Repetitions of a request, and the time after which it is not repeated any more.
const MAX_RETRIES: usize = 3;
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// The slowest upload that is waited for, in addition to [`UPLOAD_BASE`].
const SLOWEST_BYTES_PER_S: u64 = 64 << 10;
const UPLOAD_BASE: Duration = Duration::from_mins(5);
/// Time limit of a listing, and of a download of a part of an object.
const READ_LIMIT: Duration = Duration::from_mins(5);
const EXPECTED: &str = "expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///DIR";

#[derive(Debug, Error)]
pub enum ObjectError {
    #[error("the object store URL {url:?} is invalid: {remedy}")]
    Url { url: String, remedy: String },
    #[error("cannot set up the object store of {url}; {remedy}")]
    Setup { url: String, remedy: &'static str, source: object_store::Error },
    #[error("access to {url} was refused; {remedy}")]
    Access { url: String, remedy: &'static str, source: object_store::Error },
    #[error("there is no object {url}")]
    Missing { url: String },
    #[error("the bucket of {url} does not exist; create the bucket, or correct the URL")]
    NoBucket { url: String },
    #[error("the object store of {url} cannot be used; {remedy}")]
    Request { url: String, remedy: &'static str, source: object_store::Error },
    #[error("the object store did not complete a request for {url} within {seconds} s")]
    Timeout { url: String, seconds: u64 },
    #[error("{url} has more than {MAX_OBJECTS} objects; use a longer prefix")]
    TooMany { url: String },
    #[error("cannot read {path}", path = path.display())]
    File { path: std::path::PathBuf, source: std::io::Error },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    S3,
    Google,
    Azure,
    Folder,
}

impl Scheme {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "s3" => Some(Self::S3),
            "gs" => Some(Self::Google),
            "az" => Some(Self::Azure),
            "file" => Some(Self::Folder),
            _ => None,
        }
    }

    /// Where credentials are configured.
    fn remedy(self) -> &'static str {
        match self {
            Self::S3 => {
                "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL in the environment, or the role of \
                 the machine"
            }
            Self::Google => "correct GOOGLE_APPLICATION_CREDENTIALS in the environment, or the service account of the machine",
            Self::Azure => {
                "correct AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in the environment, or the identity of the machine"
            }
            Self::Folder => "correct the path or its permissions",
        }
    }
}

/// A place in an object store: a bucket and a prefix in it. Contains no secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUrl {
    scheme: Scheme,
    url: Url,
    path: Path,
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}

impl FromStr for StoreUrl {
    type Err = ObjectError;

    fn from_str(text: &str) -> Result<Self, ObjectError> {
        let fail = |remedy: String| ObjectError::Url { url: without_secrets(text), remedy };
        let url = Url::parse(text).map_err(|error| fail(format!("{error}; {EXPECTED}")))?;
        let scheme = Scheme::parse(url.scheme()).ok_or_else(|| fail(EXPECTED.to_owned()))?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(fail("credentials and options belong into the environment, not into the URL".to_owned()));
        }
        if (scheme == Scheme::Folder) != url.host_str().is_none_or(str::is_empty) {
            return Err(fail(EXPECTED.to_owned()));
        }
        let path = Path::from_url_path(url.path()).map_err(|error| fail(error.to_string()))?;
        Ok(Self { scheme, url, path })
    }
}

/// Whether the store says that there is no such bucket: it has no error of its own in the library.
fn names_no_bucket(error: &object_store::Error) -> bool {
    let text = display_chain(error);
    ["NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist"].iter().any(|code| text.contains(code))
}

/// The URL for messages, without what may be a secret.
fn without_secrets(text: &str) -> String {
    match text.split_once("://") {
        Some((scheme, _)) if text.contains(['@', '?', '#']) => format!("{scheme}://..."),
        _ => text.to_owned(),
    }
}

/// Whether an argument is a URL instead of a path.
pub fn is_url(argument: &FilePath) -> bool {
    let scheme = argument.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// An object below a [`StoreUrl`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundObject {
    pub key: Path,
    pub bytes: u64,
    /// For messages.
    pub url: String,
}

/// An opened object store. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    at: StoreUrl,
}

impl Objects {
    /// Does not access the store.
    pub fn open(at: StoreUrl) -> Result<Self, ObjectError> {
        // The HTTP client takes the one of the process. An error means that there is one already.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { max_retries: MAX_RETRIES, retry_timeout: RETRY_TIMEOUT, ..RetryConfig::default() };
        let url = at.url.as_str();
        let built: Result<Arc<dyn ObjectStore>, object_store::Error> = match at.scheme {
            Scheme::S3 => AmazonS3Builder::from_env().with_url(url).with_retry(retry).build().map(|store| Arc::new(store) as _),
            Scheme::Google => {
                GoogleCloudStorageBuilder::from_env().with_url(url).with_retry(retry).build().map(|store| Arc::new(store) as _)
            }
            Scheme::Azure => {
                MicrosoftAzureBuilder::from_env().with_url(url).with_retry(retry).build().map(|store| Arc::new(store) as _)
            }
            Scheme::Folder => Ok(Arc::new(LocalFileSystem::new())),
        };
        let store = built.map_err(|source| ObjectError::Setup { url: at.to_string(), remedy: at.scheme.remedy(), source })?;
        Ok(Self { store, at })
    }

    pub fn url(&self) -> &StoreUrl {
        &self.at
    }

    /// The key `folder/file` below the prefix; characters that are not allowed in keys are encoded.
    pub fn key(&self, folder: &str, file: &str) -> Path {
        self.at.path.clone().join(folder).join(file)
    }

    /// The URL of a key, for messages and for `report`.
    fn url_of(&self, key: &Path) -> String {
        match self.at.url.host_str() {
            Some(bucket) if !bucket.is_empty() => format!("{}://{bucket}/{key}", self.at.url.scheme()),
            _ => format!("{}:///{key}", self.at.url.scheme()),
        }
    }

    fn error(&self, key: &Path, source: object_store::Error) -> ObjectError {
        let (url, remedy) = (self.url_of(key), self.at.scheme.remedy());
        match source {
            object_store::Error::NotFound { .. } => ObjectError::Missing { url },
            source @ (object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }) => {
                ObjectError::Access { url, remedy, source }
            }
            source if names_no_bucket(&source) => ObjectError::NoBucket { url },
            source => ObjectError::Request { url, remedy, source },
        }
    }

    async fn limited<T>(
        &self,
        key: &Path,
        limit: Duration,
        request: impl Future<Output = Result<T, ObjectError>>,
    ) -> Result<T, ObjectError> {
        let late = |_| ObjectError::Timeout { url: self.url_of(key), seconds: limit.as_secs() };
        tokio::time::timeout(limit, request).await.map_err(late)?
    }

    /// Uploads a complete file; the object appears when all of it has arrived. Returns its size.
    pub async fn put_file(&self, file: &FilePath, key: &Path) -> Result<u64, ObjectError> {
        let unreadable = |source| ObjectError::File { path: file.to_owned(), source };
        let path = file.to_owned();
        let opened = blocking(move || {
            let file = File::open(path)?;
            let bytes = file.metadata()?.len();
            Ok((Arc::new(file), bytes))
        });
        let (opened, bytes) = opened.await.map_err(unreadable)?;
        let limit = UPLOAD_BASE + Duration::from_secs(bytes / SLOWEST_BYTES_PER_S);
        let upload = async {
            if bytes <= PART_BYTES {
                let content = part(&opened, 0, bytes).await.map_err(unreadable)?;
                self.store.put(key, content.into()).await.map_err(|error| self.error(key, error))?;
                return Ok(bytes);
            }
            let upload = self.store.put_multipart(key).await.map_err(|error| self.error(key, error))?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES as usize);
            let mut offset = 0;
            while offset < bytes {
                let sent = match part(&opened, offset, PART_BYTES.min(bytes - offset)).await {
                    Ok(content) => {
                        offset += content.len() as u64;
                        upload.put(content.into());
                        upload.wait_for_capacity(1).await.map_err(|error| self.error(key, error))
                    }
                    Err(error) => Err(unreadable(error)),
                };
                if let Err(error) = sent {
                    // The store keeps parts of uploads that are not aborted. The first error is the one to report.
                    let _aborted = upload.abort().await;
                    return Err(error);
                }
            }
            upload.finish().await.map_err(|error| self.error(key, error))?;
            Ok(bytes)
        };
        self.limited(key, limit, upload).await
    }

    /// The objects below `folder` of the prefix; all below the prefix if it is empty.
    pub async fn list(&self, folder: &str) -> Result<Vec<FoundObject>, ObjectError> {
        let prefix = if folder.is_empty() { self.at.path.clone() } else { self.at.path.clone().join(folder) };
        let listing = async {
            let mut found = Vec::new();
            let mut objects = self.store.list(Some(&prefix));
            loop {
                match objects.try_next().await {
                    Ok(Some(meta)) if found.len() < MAX_OBJECTS => {
                        let url = self.url_of(&meta.location);
                        found.push(FoundObject { key: meta.location, bytes: meta.size, url });
                    }
                    Ok(Some(_)) => return Err(ObjectError::TooMany { url: self.url_of(&prefix) }),
                    Ok(None) => return Ok(found),
                    // A folder that does not exist has no files.
                    Err(object_store::Error::NotFound { .. }) => return Ok(found),
                    Err(error) => return Err(self.error(&prefix, error)),
                }
            }
        };
        self.limited(&prefix, READ_LIMIT, listing).await
    }

    /// The object at the URL itself; `None` if there is none.
    pub async fn own(&self) -> Result<Option<FoundObject>, ObjectError> {
        let key = &self.at.path;
        // A request for the bucket succeeds, but it is not an object.
        if key.is_root() {
            return Ok(None);
        }
        let head = async { self.store.head(key).await.map_err(|error| self.error(key, error)) };
        match self.limited(key, READ_LIMIT, head).await {
            Ok(meta) => Ok(Some(FoundObject { url: self.url_of(&meta.location), key: meta.location, bytes: meta.size })),
            Err(ObjectError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Bytes of an object, from `from` to before `to`.
    pub async fn range(&self, key: &Path, from: u64, to: u64) -> Result<Vec<u8>, ObjectError> {
        let mut content = Vec::new();
        let mut offset = from;
        while offset < to {
            let end = to.min(offset + PART_BYTES);
            let request = async { self.store.get_range(key, offset..end).await.map_err(|error| self.error(key, error)) };
            content.extend_from_slice(&self.limited(key, READ_LIMIT, request).await?);
            offset = end;
        }
        Ok(content)
    }
}

async fn part(file: &Arc<File>, offset: u64, bytes: u64) -> std::io::Result<Vec<u8>> {
    let file = Arc::clone(file);
    blocking(move || {
        let mut content = vec![0; usize::try_from(bytes).unwrap_or_default()];
        file.read_exact_at(&mut content, offset)?;
        Ok(content)
    })
    .await
}

/// On a thread where a disk may hang.
async fn blocking<T: Send + 'static>(read: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_place_and_never_contain_credentials() {
        let cases = [
            ("s3://bucket/a/b", "ok a/b"),
            ("gs://bucket", "ok "),
            ("az://container/x/", "ok x"),
            ("file:///var/lib/x", "ok var/lib/x"),
            ("file://host/x", EXPECTED),
            ("s3:///x", EXPECTED),
            ("http://host/x", EXPECTED),
            ("s3://key:secret@bucket/x", "\"s3://...\" is invalid: credentials"),
            ("az://container/x?sig=secret", "\"az://...\" is invalid: credentials"),
            ("bucket", "expected s3://"),
        ];
        for (text, expect) in cases {
            let found = text.parse::<StoreUrl>().map_or_else(|error| error.to_string(), |url| format!("ok {}", url.path));
            assert!(found.contains(expect) && !found.contains("secret"), "{text}: {found}");
        }
    }

    #[test]
    fn paths_and_urls_are_distinguished() {
        for (text, expect) in [("s3://a/b", true), ("ftp://a", true), ("a/b.gpus", false), ("/a://b", false), ("://", false)] {
            assert_eq!(is_url(FilePath::new(text)), expect, "{text}");
        }
    }

    #[tokio::test]
    async fn a_file_of_several_parts_arrives_whole_in_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::open(format!("file://{}", dir.path().join("store").display()).parse().unwrap()).unwrap();
        assert_eq!(objects.list("node").await.unwrap(), []);
        let content: Vec<u8> = (0..PART_BYTES * 2 + 5).map(|n| (n % 251) as u8).collect();
        let file = dir.path().join("file");
        for bytes in [0, 10, content.len()] {
            std::fs::write(&file, &content[..bytes]).unwrap();
            let key = objects.key("node", &format!("{bytes}.gpus"));
            assert_eq!(objects.put_file(&file, &key).await.unwrap(), bytes as u64);
            assert!(objects.range(&key, 0, bytes as u64).await.unwrap() == content[..bytes]);
        }
        assert_eq!(objects.list("node").await.unwrap().len(), 3);
        assert_eq!(objects.own().await.unwrap(), None, "a folder is not an object");
        let missing = objects.put_file(&dir.path().join("none"), &objects.key("node", "x")).await.unwrap_err();
        assert!(matches!(missing, ObjectError::File { .. }));
    }
}
