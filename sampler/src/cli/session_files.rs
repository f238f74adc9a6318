//! Session files of the command line: paths, folders, and URLs of object stores.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use sampler_session::{End, Header, Session};
use tokio::runtime::Runtime;

use crate::objects::{FoundObject, Objects, StoreUrl, is_url};
use crate::session::{self, EXTENSION, MAX_FILE_BYTES, SessionError};

/// Bytes read at the beginning and at the end of a file to find its span.
const BEGINNING_BYTES: u64 = 256 << 10;
const LAST_BYTES: u64 = 4096;
/// Depth of folders that are searched: PREFIX/NODE/FILE, and one more.
const MAX_DEPTH: usize = 3;

enum Location {
    File(PathBuf),
    Object(Objects, FoundObject),
}

pub struct SessionFile {
    /// Path or URL, for messages.
    pub name: String,
    location: Location,
    bytes: u64,
}

/// What is known of a file without reading all of it.
pub struct SessionOutline {
    pub header: Header,
    /// `None` if the session was not stopped in order.
    pub end: Option<End>,
}

/// Reads session files; requests to object stores run here.
pub struct SessionFiles {
    runtime: Runtime,
}

impl SessionFiles {
    pub fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self { runtime: runtime.context("cannot start the IO runtime")? })
    }

    /// The session of an argument that names one file.
    pub fn read_one(&self, argument: &Path) -> anyhow::Result<Session> {
        if !is_url(argument) {
            return Ok(session::read(argument)?);
        }
        let objects = open(argument)?;
        match self.runtime.block_on(objects.own())? {
            Some(object) => self.read(&of_object(&objects, object)),
            None => bail!("there is no object {}; a prefix needs --fleet", argument.display()),
        }
    }

    /// The session files that an argument stands for: itself, or all below a folder or prefix, sorted by name.
    pub fn find(&self, argument: &Path) -> anyhow::Result<Vec<SessionFile>> {
        let mut found = Vec::new();
        if is_url(argument) {
            let objects = open(argument)?;
            match self.runtime.block_on(objects.own())? {
                Some(object) => found.push(of_object(&objects, object)),
                None => {
                    let objects_found = self.runtime.block_on(objects.list(""))?.into_iter();
                    let is_session = |object: &FoundObject| object.key.extension() == Some(EXTENSION);
                    found.extend(objects_found.filter(is_session).map(|object| of_object(&objects, object)));
                }
            }
        } else {
            let meta = std::fs::metadata(argument).with_context(|| format!("cannot read {}", argument.display()))?;
            if meta.is_dir() {
                below(argument, MAX_DEPTH, &mut found)?;
            } else {
                found.push(of_path(argument, meta.len()));
            }
        }
        if found.is_empty() {
            bail!("there is no session file (*.{EXTENSION}) below {}", argument.display());
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    pub fn outline(&self, file: &SessionFile) -> anyhow::Result<SessionOutline> {
        let beginning = self.range(file, 0, file.bytes.min(BEGINNING_BYTES))?;
        let header = sampler_session::header(&beginning);
        let header = header.with_context(|| format!("{} cannot be read as a session: it has no valid header", file.name))?;
        let last = self.range(file, file.bytes.saturating_sub(LAST_BYTES), file.bytes)?;
        Ok(SessionOutline { header, end: sampler_session::end(&last) })
    }

    pub fn read(&self, file: &SessionFile) -> anyhow::Result<Session> {
        let path = || PathBuf::from(&file.name);
        match &file.location {
            Location::File(path) => Ok(session::read(path)?),
            Location::Object(..) if file.bytes > MAX_FILE_BYTES => {
                Err(SessionError::TooLarge { path: path(), bytes: file.bytes }.into())
            }
            Location::Object(..) => Ok(session::from_bytes(&self.range(file, 0, file.bytes)?, &path())?),
        }
    }

    fn range(&self, file: &SessionFile, from: u64, to: u64) -> anyhow::Result<Vec<u8>> {
        match &file.location {
            Location::Object(objects, object) => Ok(self.runtime.block_on(objects.range(&object.key, from, to))?),
            Location::File(path) => {
                let cannot = || format!("cannot read {}", path.display());
                // Opening a named pipe would block.
                if !std::fs::metadata(path).with_context(cannot)?.is_file() {
                    return Err(SessionError::NoFile { path: path.clone() }.into());
                }
                let mut content = vec![0; usize::try_from(to.saturating_sub(from))?];
                File::open(path).and_then(|opened| opened.read_exact_at(&mut content, from)).with_context(cannot)?;
                Ok(content)
            }
        }
    }
}

fn open(argument: &Path) -> anyhow::Result<Objects> {
    let url: StoreUrl = argument.to_str().context("a URL is UTF-8")?.parse()?;
    Ok(Objects::open(url)?)
}

fn of_object(objects: &Objects, object: FoundObject) -> SessionFile {
    SessionFile { name: object.url.clone(), bytes: object.bytes, location: Location::Object(objects.clone(), object) }
}

fn of_path(path: &Path, bytes: u64) -> SessionFile {
    SessionFile { name: path.display().to_string(), bytes, location: Location::File(path.to_owned()) }
}

fn below(folder: &Path, depth: usize, found: &mut Vec<SessionFile>) -> anyhow::Result<()> {
    let cannot = || format!("cannot list {}", folder.display());
    for entry in std::fs::read_dir(folder).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        let meta = std::fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
        if meta.is_dir() && depth > 1 {
            below(&path, depth - 1, found)?;
        } else if meta.is_file() && path.extension().is_some_and(|end| end == EXTENSION) {
            found.push(of_path(&path, meta.len()));
        }
    }
    Ok(())
}
