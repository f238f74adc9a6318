//! Why a file with credentials or certificates cannot be used.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Of any file here; those of CA bundles have some 200 KiB.
const MAX_FILE_BYTES: u64 = 4 << 20;

#[derive(Debug, Error)]
pub enum SecurityError {
    #[error("cannot read {what} {path}; it must exist and be readable", path = path.display())]
    Read { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("the web configuration {path} is invalid: {message}; its format is that of Prometheus' exporter-toolkit", path = path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("the web configuration {path} is invalid: {key}: {remedy}", path = path.display())]
    Key { path: PathBuf, key: String, remedy: String },
    #[error("{place} is not usable: {problem}; expected PEM")]
    Pem { place: String, problem: String },
    #[error("token_file = {path} is invalid: {problem}", path = path.display())]
    Tokens { path: PathBuf, problem: String },
}

/// The text of a file of limited size.
pub fn read_file(what: &'static str, path: &Path) -> Result<String, SecurityError> {
    let failed = |source| SecurityError::Read { what, path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(failed(std::io::Error::other(format!("it has more than {MAX_FILE_BYTES} bytes"))));
    }
    Ok(text)
}

/// Maker of an error for a key of the web configuration.
pub type InvalidKey<'a> = &'a dyn Fn(&str, String) -> SecurityError;
