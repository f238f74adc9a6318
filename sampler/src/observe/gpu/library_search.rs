//! Finds the driver's library: at the configured path, where the loader finds it, or where distributions and container platforms keep it.
//!
//! ```text
//!  configured --> that file alone
//!  otherwise: the file found before --> the loader's own search --> every place, then the same place below the host's root
//! ```
//! A file that exists and cannot be loaded does not end the search; it is named if nothing else is found. A library of another version than
//! the kernel module does not end it either: a container image may have one of its own.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::diagnosis::DriverFiles;
use super::error::GpuError;
use super::library::{init, path_of};
use crate::config::Config;
use crate::host_root::Root;

/// The file name that the driver installs; `libnvidia-ml.so` alone exists only with the development files.
const FILE: &str = "libnvidia-ml.so.1";

/// Folders of the library, in the order of the search.
const PLACES: [&str; 20] = [
    // NVIDIA GPU Operator: the root file system of the driver container.
    "/run/nvidia/driver/usr/lib64",
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib/aarch64-linux-gnu",
    // Talos: the nvidia-container-toolkit extension.
    "/usr/local/glibc/usr/lib",
    // Google Container-Optimized OS: its driver installer, and the same folder within containers of GKE.
    "/home/kubernetes/bin/nvidia/lib64",
    "/usr/local/nvidia/lib64",
    // NixOS.
    "/run/opengl-driver/lib",
    // Windows Subsystem for Linux.
    "/usr/lib/wsl/lib",
    // Bottlerocket: kmod-*-nvidia.spec installs to `%{_cross_libdir}/nvidia/tesla`, which is below the sysroot of its toolchain
    // (github.com/bottlerocket-os/bottlerocket-kernel-kit/issues/365, bottlerocket-core-kit/pull/919).
    "/usr/lib/nvidia/tesla",
    "/x86_64-bottlerocket-linux-gnu/sys-root/usr/lib/nvidia/tesla",
    "/aarch64-bottlerocket-linux-gnu/sys-root/usr/lib/nvidia/tesla",
    "/x86_64-bottlerocket-linux-gnu/sys-root/usr/lib",
    "/aarch64-bottlerocket-linux-gnu/sys-root/usr/lib",
    // Debian and Ubuntu; RHEL, SUSE and Amazon Linux; Arch and Alpine.
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib/aarch64-linux-gnu/nvidia/current",
    "/usr/lib64",
    "/usr/lib64/nvidia",
    "/usr/lib",
];

/// Processor types of ELF files, which NVIDIA has drivers for.
const MACHINES: [(u16, &str); 5] = [(3, "32-bit x86"), (21, "POWER"), (40, "32-bit ARM"), (62, "x86-64"), (183, "64-bit ARM")];
#[cfg(target_arch = "aarch64")]
const OWN_MACHINE: u16 = 183;
#[cfg(not(target_arch = "aarch64"))]
const OWN_MACHINE: u16 = 62;

/// A file to load.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Candidate {
    /// By its name, through the search of the dynamic loader.
    Loader,
    /// By its path in this mount namespace.
    File(PathBuf),
    /// By its path below the host's root, where links are resolved as on the host.
    OnHost(PathBuf),
}

/// A file that exists and cannot be loaded.
#[derive(Debug, PartialEq, Eq)]
pub struct Unloadable {
    pub path: PathBuf,
    pub reason: String,
}

/// The result of a search that found no library.
#[derive(Debug)]
pub struct NotFound {
    /// Every file that was tried.
    pub tried: Vec<PathBuf>,
    pub unloadable: Vec<Unloadable>,
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.tried.len();
        match self.unloadable.as_slice() {
            [] => write!(f, "there is no NVIDIA driver library: {FILE} is in none of {n} places"),
            [Unloadable { path, reason }] if n == 1 => {
                write!(f, "the NVIDIA driver library {} cannot be used: it {reason}", path.display())
            }
            [Unloadable { path, reason }, more @ ..] => {
                write!(f, "no NVIDIA driver library can be loaded: of {n} places, {} has one, which {reason}", path.display())?;
                more.iter().try_for_each(|file| write!(f, "; {} has one, which {}", file.path.display(), file.reason))
            }
        }
    }
}

/// A library that is open and initialized.
pub struct OpenedLibrary {
    pub nvml: Nvml,
    /// The file that was loaded.
    pub path: PathBuf,
}

/// The search, which remembers what it found.
pub struct LibrarySearch {
    configured: Option<PathBuf>,
    root: Root,
    has_host_root: bool,
    found: Option<Candidate>,
    pub files: DriverFiles,
}

impl LibrarySearch {
    pub fn new(config: &Config) -> Self {
        Self {
            configured: config.nvml_lib.clone(),
            root: Root::new(&config.path_rootfs),
            has_host_root: config.path_rootfs.parent().is_some(),
            found: None,
            files: DriverFiles::new(config),
        }
    }

    pub fn is_configured(&self) -> bool {
        self.configured.is_some()
    }

    fn candidates(&self) -> Vec<Candidate> {
        if let Some(configured) = &self.configured {
            return vec![Candidate::File(configured.clone())];
        }
        let mut all: Vec<Candidate> = self.found.iter().cloned().collect();
        all.push(Candidate::Loader);
        for place in PLACES {
            let file = Path::new(place).join(FILE);
            all.push(Candidate::File(file.clone()));
            if self.has_host_root {
                all.push(Candidate::OnHost(file));
            }
        }
        all
    }

    fn path(&self, candidate: &Candidate) -> PathBuf {
        match candidate {
            Candidate::Loader => FILE.into(),
            Candidate::File(path) => path.clone(),
            Candidate::OnHost(path) => self.root.path(path),
        }
    }

    fn unusable(&self, path: PathBuf, error: &NvmlError) -> GpuError {
        GpuError::Init { diagnosis: self.files.explain(error, &path), path }
    }

    /// Loads and initializes the library. May hang in the driver.
    pub fn open(&mut self) -> Result<OpenedLibrary, GpuError> {
        let (mut tried, mut unloadable) = (Vec::new(), Vec::new());
        let mut mismatch = None;
        for candidate in self.candidates() {
            let path = self.path(&candidate);
            if tried.contains(&path) {
                continue;
            }
            tried.push(path.clone());
            let is_file = candidate != Candidate::Loader;
            if is_file && self.configured.is_none() {
                if !path.exists() {
                    continue;
                }
                if !is_trusted(&path) {
                    let reason = "is not loaded: a user other than root owns it or its folder, or may write there; name it with --nvml-lib";
                    unloadable.push(Unloadable { path, reason: reason.into() });
                    continue;
                }
            }
            match init(&path) {
                Ok(nvml) => {
                    let path = path_of(&nvml).unwrap_or(path);
                    // By its name the loader could find another file later.
                    self.found = Some(if is_file { candidate } else { Candidate::File(path.clone()) });
                    return Ok(OpenedLibrary { nvml, path });
                }
                Err(NvmlError::LibloadingError(error)) => {
                    let reason = load_failure(&error.to_string(), &path);
                    unloadable.extend(reason.map(|reason| Unloadable { path, reason }));
                }
                Err(NvmlError::FailedToLoadSymbol(_)) => {
                    unloadable
                        .push(Unloadable { path, reason: "is not the NVIDIA driver library: it has no nvmlInit_v2".into() });
                }
                Err(error @ NvmlError::LibRmVersionMismatch) if self.configured.is_none() => {
                    mismatch.get_or_insert((path, error));
                }
                Err(error) => return Err(self.unusable(path, &error)),
            }
        }
        match mismatch {
            Some((path, error)) => Err(self.unusable(path, &error)),
            None => Err(GpuError::Library(NotFound { tried, unloadable })),
        }
    }
}

/// Whether only root, or the user of this process, may replace the file: one of the searched folders is the home of a user on other
/// distributions.
fn is_trusted(path: &Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let is_safe = |path: &Path| {
        let metadata = path.metadata();
        metadata.is_ok_and(|found| (found.uid() == 0 || found.uid() == own) && found.mode() & 0o002 == 0)
    };
    path.canonicalize().is_ok_and(|path| is_safe(&path) && path.parent().is_some_and(is_safe))
}

/// Why the loader did not load this file; `None` if its search found none.
fn load_failure(error: &str, path: &Path) -> Option<String> {
    if path == Path::new(FILE) && error.starts_with(FILE) && error.contains("No such file") {
        return None;
    }
    let reason = elf_problem(path).unwrap_or_else(|| {
        if error.contains("GLIBC_") || error.contains("GLIBCXX_") {
            format!("needs a newer C library than that of this agent ({error})")
        } else if error.contains("musl") {
            format!("was built for another C library than this agent ({error})")
        } else {
            format!("cannot be loaded ({error})")
        }
    });
    Some(reason)
}

/// What the header of the file shows: it is not a library, or one for another processor.
fn elf_problem(path: &Path) -> Option<String> {
    let mut header = [0; 20];
    if File::open(path).and_then(|mut file| file.read_exact(&mut header)).is_err() || header[..4] != *b"\x7fELF" {
        return path.is_file().then(|| "is not a library (it does not begin with an ELF header)".into());
    }
    let machine = u16::from_le_bytes([header[18], header[19]]);
    if machine == OWN_MACHINE {
        return None;
    }
    let name = |machine| MACHINES.iter().find(|(known, _)| *known == machine).map_or("another processor", |(_, name)| *name);
    Some(format!("is for {}, and this agent is for {}", name(machine), name(OWN_MACHINE)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn search(root: &Path) -> LibrarySearch {
        let settings = crate::config::Settings { path_rootfs: Some(root.to_owned()), ..Default::default() };
        LibrarySearch::new(&settings.validate(None).unwrap())
    }

    fn not_found(root: &Path) -> NotFound {
        match search(root).open() {
            Err(GpuError::Library(not_found)) => not_found,
            Err(error) => panic!("{error}"),
            Ok(opened) => panic!("a driver library of this machine: {}", opened.path.display()),
        }
    }

    #[test]
    fn a_file_that_any_user_may_write_is_not_loaded() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("usr/lib/wsl/lib");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(FILE), elf(OWN_MACHINE)).unwrap();
        let reasons = || not_found(root.path()).unloadable.iter().map(|file| file.reason.clone()).collect::<String>();
        assert!(!reasons().contains("may write there"), "{}", reasons());
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(reasons().contains("may write there"), "{}", reasons());
    }

    /// An ELF header of a library for this machine type, without content.
    fn elf(machine: u16) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        header[16] = 3;
        header[18..20].copy_from_slice(&machine.to_le_bytes());
        header
    }

    #[test]
    fn every_place_is_tried_as_it_is_and_below_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let tried = not_found(dir.path()).tried;
        assert_eq!(tried.len(), 1 + 2 * PLACES.len());
        assert_eq!(tried[0], Path::new(FILE));
        for place in PLACES {
            let file = Path::new(place).join(FILE);
            let below = dir.path().join(file.strip_prefix("/").unwrap());
            let position = |path: &Path| tried.iter().position(|tried| tried == path);
            assert_eq!(position(&file).unwrap() + 1, position(&below).unwrap(), "{place}");
        }
        let text = not_found(dir.path()).to_string();
        assert_eq!(text, "there is no NVIDIA driver library: libnvidia-ml.so.1 is in none of 41 places");
    }

    #[test]
    fn a_file_that_cannot_be_loaded_is_named_with_the_reason() {
        let other = if OWN_MACHINE == 62 { 183 } else { 62 };
        for (content, expect) in [
            (elf(other), if OWN_MACHINE == 62 { "is for 64-bit ARM, and this agent is for x86-64" } else { "is for x86-64" }),
            (b"#!/bin/sh\n".to_vec(), "is not a library"),
            (Vec::new(), "is not a library"),
            (elf(OWN_MACHINE), "cannot be loaded ("),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let folder = dir.path().join("usr/local/glibc/usr/lib");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(FILE), content).unwrap();
            let found = not_found(dir.path());
            assert_eq!(found.unloadable.len(), 1, "{found}");
            assert_eq!(found.unloadable[0].path, folder.join(FILE));
            assert!(found.unloadable[0].reason.starts_with(expect), "{found}");
            assert!(found.to_string().contains("of 41 places"), "{found}");
        }
    }

    #[test]
    fn reasons_of_the_loader_are_classified() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        fs::write(&file, elf(OWN_MACHINE)).unwrap();
        let text = load_failure;
        let absent = "libnvidia-ml.so.1: cannot open shared object file: No such file or directory";
        assert_eq!(text(absent, Path::new(FILE)), None);
        let newer = "/lib/libc.so.6: version `GLIBC_2.38' not found (required by /x/libnvidia-ml.so.1)";
        assert!(text(newer, &file).unwrap().starts_with("needs a newer C library"));
        let musl = "libc.musl-x86_64.so.1: cannot open shared object file: No such file or directory";
        assert!(text(musl, &file).unwrap().starts_with("was built for another C library"));
    }

    #[test]
    fn the_configured_file_is_the_only_candidate() {
        let file = PathBuf::from("/x/libnvidia-ml.so.1");
        let mut search = search(Path::new("/"));
        (search.configured, search.found) = (Some(file.clone()), Some(Candidate::Loader));
        assert_eq!(search.candidates(), [Candidate::File(file)]);
    }
}
