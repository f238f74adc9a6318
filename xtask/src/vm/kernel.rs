//! A kernel unpacked from its packages: the image, an initial file system that finds the root, and a disk with its modules.

use super::{
    apt::{self, Apt},
    cpio::Archive,
    image::{self, MKFS_OPTIONS, make_ext4},
};
use crate::{
    janitor::{Cleanup, Leftover},
    tools::{self, program},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// To be raised with every change of [`unpack`] that the other parts of the digest do not cover.
const RECIPE: &str = "2";
/// Modules that are needed to find the root file system, without their dependencies; a kernel may have them built in.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];
const INIT: &str = include_str!("init.sh");
const MODULES_BYTES: u64 = 512 << 20;
/// The folder of a kernel is named `kernel-RELEASE-DIGEST`.
const FOLDER: &str = "kernel-";

pub struct Kernel {
    dir: PathBuf,
}

/// The unpacked kernel that `wanted` selects.
pub fn cached(vm: &Path, wanted: &str) -> Result<Option<String>> {
    let digest = digest();
    let mut releases = Vec::new();
    for entry in fs::read_dir(vm).with_context(|| vm.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let release = name.strip_prefix(FOLDER).and_then(|rest| rest.strip_suffix(&digest)?.strip_suffix('-'));
        releases.extend(release.map(str::to_owned));
    }
    Ok(apt::choose(wanted, releases.iter().map(String::as_str)).map(str::to_owned))
}

/// The kernel of that release, unpacked if it is missing. `apt` is given if its lists were needed before.
pub fn ensure(apt: Option<Apt>, vm: &Path, release: &str, cleanup: &mut Cleanup) -> Result<Kernel> {
    let dir = vm.join(format!("{FOLDER}{release}-{}", digest()));
    if !dir.exists() {
        let apt = apt.map_or_else(|| Apt::prepare(vm), Ok)?;
        let tree = vm.join(format!("new-kernel-{}", std::process::id()));
        cleanup.will_remove(&Leftover::Tree(tree.clone()))?;
        unpack(&apt, release, &tree)?;
        fs::rename(tree.join("done"), &dir).with_context(|| dir.display().to_string())?;
        image::remove_older(vm, &dir, &format!("{FOLDER}{release}"), "")?;
    }
    Ok(Kernel { dir })
}

fn digest() -> String {
    let (modules, bytes, options) = (MODULES.join(" "), MODULES_BYTES.to_string(), MKFS_OPTIONS.join(" "));
    format!("{:08x}", image::digest(&[RECIPE, &modules, &bytes, &options]))
}

impl Kernel {
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    pub fn modules(&self) -> PathBuf {
        self.dir.join("modules.ext4")
    }

    /// Built for each run: it takes a moment and follows changes of the script.
    pub fn initrd(&self) -> Result<Vec<u8>> {
        initrd(&self.dir)
    }
}

fn unpack(apt: &Apt, release: &str, tree: &Path) -> Result<()> {
    let done = tree.join("done");
    fs::create_dir_all(done.join("initrd.d")).with_context(|| tree.display().to_string())?;
    // Newer packages are split; which parts exist differs.
    let mut names: Vec<String> = ["image", "binary", "modules", "base"].map(|part| format!("linux-{part}-{release}")).into();
    names.push("busybox-static".into());
    for package in apt.download(&names)? {
        tools::run(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(tree))?;
        fs::remove_file(&package)?;
    }
    // Older packages have /lib/modules, newer ones /usr/lib/modules.
    if !tree.join("lib/modules").exists() {
        fs::create_dir_all(tree.join("lib"))?;
        fs::rename(tree.join("usr/lib/modules"), tree.join("lib/modules")).context("the packages have no modules")?;
    }
    let images = [tree.join("boot").join(format!("vmlinuz-{release}")), tree.join("lib/modules").join(release).join("vmlinuz")];
    let image =
        images.iter().find(|image| image.is_file()).with_context(|| format!("the packages of {release} have no vmlinuz"))?;
    fs::rename(image, done.join("vmlinuz"))?;
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| tree.join(path));
    let busybox = busybox.iter().find(|file| file.is_file()).context("busybox-static has no busybox")?;
    fs::copy(busybox, done.join("initrd.d/busybox"))?;
    tools::run(program("depmod")?.arg("--basedir").arg(tree).arg(release))?;
    for (n, module) in needed(tree, release)?.into_iter().enumerate() {
        let name = module.file_stem().unwrap_or_default().to_string_lossy().replace(".ko", "");
        fs::write(done.join(format!("initrd.d/{n:02}-{name}.ko")), uncompressed(&module)?)?;
    }
    make_ext4(&tree.join("lib/modules"), &done.join("modules.ext4"), MODULES_BYTES)
}

/// Module files in their load order.
fn needed(tree: &Path, release: &str) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in MODULES {
        let mut modprobe = program("modprobe")?;
        modprobe.env("LC_ALL", "C").arg("--dirname").arg(tree).args(["--set-version", release, "--show-depends", module]);
        let output = modprobe.output().with_context(|| tools::shown(&modprobe))?;
        let problem = String::from_utf8_lossy(&output.stderr);
        // A module that is not found may be built in. If it is missing instead, the machine will not find its root.
        if !output.status.success() && !problem.contains("not found") {
            bail!("`{}` failed ({}): {}", tools::shown(&modprobe), output.status, problem.trim());
        }
        let listed = String::from_utf8_lossy(&output.stdout);
        let paths = listed.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|path| PathBuf::from(path.trim()));
        for path in paths {
            if !files.contains(&path) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn uncompressed(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|end| end.to_str()) {
        Some("ko") => return fs::read(module).with_context(|| module.display().to_string()),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("{}: unknown compression", module.display()),
    };
    let output = Command::new(program).args(["-d", "-c"]).arg(module).output().with_context(|| program.to_owned())?;
    if !output.status.success() {
        bail!("{program} -d {}: {}", module.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

fn initrd(dir: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "modules", "proc", "root", "sys"] {
        archive.directory(name);
    }
    archive.file("init", INIT.as_bytes());
    let mut files: Vec<PathBuf> = fs::read_dir(dir.join("initrd.d"))?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let to = if name == "busybox" { "bin/busybox".to_owned() } else { format!("modules/{name}") };
        archive.file(&to, &fs::read(&file).with_context(|| file.display().to_string())?);
    }
    Ok(archive.finish())
}
