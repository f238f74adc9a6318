//! A Debian root file system with systemd and container engines, built once per suite.

use crate::{
    debian,
    janitor::{Cleanup, Leftover},
    tools::{self, on_path, program, progress},
};
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// To be raised with every change of how an image is built that the other parts of the digest do not cover, such as one of [`configure`].
const RECIPE: &str = "2";
/// systemd, tools of the tests, and engines with their helpers. All exist in bookworm and in trixie. netavark is what podman needs of several
/// packages with one virtual name, among which debootstrap does not choose. Docker needs apparmor where the kernel has it enabled.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,kmod,iproute2,procps,python3,docker.io,containerd,\
                        podman,netavark,crun,runc,uidmap,slirp4netns,fuse-overlayfs,iptables,busybox-static,ca-certificates,strace,\
                        apparmor";
/// Packages that trixie splits off.
const TRIXIE_PACKAGES: &str = ",docker-cli,passt,aardvark-dns";
/// Units to disable: engines are started by the tests that need them, and the timers and services only disturb.
const QUIET: [&str; 12] = [
    "docker.service",
    "docker.socket",
    "containerd.service",
    "podman.service",
    "podman.socket",
    "podman-auto-update.timer",
    "podman-restart.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
];
/// Size of the file system. Sparse: only written blocks take space.
const IMAGE_BYTES: u64 = 6 << 30;
const UNIT: &str = include_str!("guest.service");
/// Replaces systemd's unit of that name.
const EMERGENCY: &str = include_str!("emergency.service");
/// Without features that 5.10 kernels lack.
pub const MKFS_OPTIONS: [&str; 4] = ["-q", "-F", "-O", "^metadata_csum,^orphan_file"];

/// The suite of the user space for a kernel.
pub fn suite_of(release: &str) -> &'static str {
    if release.contains("deb13") { "trixie" } else { "bookworm" }
}

/// The image of a suite, built if it is missing. Its name contains a digest of the recipe, so a changed recipe builds a new one.
pub fn ensure(vm: &Path, suite: &str, cleanup: &mut Cleanup) -> Result<PathBuf> {
    let packages = if suite == "trixie" { format!("{PACKAGES}{TRIXIE_PACKAGES}") } else { PACKAGES.to_owned() };
    let (quiet, bytes, options) = (QUIET.join(" "), IMAGE_BYTES.to_string(), MKFS_OPTIONS.join(" "));
    let digest = digest(&[RECIPE, &packages, UNIT, EMERGENCY, &quiet, &bytes, &options]);
    let image = vm.join(format!("root-{suite}-{digest:08x}.ext4"));
    if image.exists() {
        return Ok(image);
    }
    progress(format_args!("vm: building a root file system of {suite}, once; this takes some minutes"));
    let mirror = debian::mirror()?;
    let work = vm.join(format!("new-root-{}", std::process::id()));
    cleanup.will_remove(&Leftover::Tree(work.clone()))?;
    fs::create_dir(&work).with_context(|| work.display().to_string())?;
    let (tree, unfinished) = (work.join("tree"), work.join("root.ext4"));
    // In namespaces of its own, so that its mounts and processes always end with it.
    let mut debootstrap = program("unshare")?;
    debootstrap.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
    debootstrap.arg(on_path("debootstrap").context("debootstrap is not installed")?);
    debootstrap.args(["--variant=minbase", &format!("--include={packages}"), suite]).arg(&tree).arg(&mirror.url);
    tools::run(&mut debootstrap).with_context(|| format!("{}/debootstrap/debootstrap.log", tree.display()))?;
    configure(&tree)?;
    make_ext4(&tree, &unfinished, IMAGE_BYTES)?;
    fs::rename(&unfinished, &image).with_context(|| image.display().to_string())?;
    fs::remove_dir_all(&work).with_context(|| work.display().to_string())?;
    remove_older(vm, &image, &format!("root-{suite}"), ".ext4")?;
    Ok(image)
}

/// Removes the results of other recipes: `BEGIN-DIGEST` and, from before names had a digest, `BEGIN`, both followed by `END`.
pub fn remove_older(vm: &Path, kept: &Path, begin: &str, end: &str) -> Result<()> {
    for entry in fs::read_dir(vm).with_context(|| vm.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path != kept && is_made_by_a_recipe(&name, begin, end) {
            progress(format_args!("vm: removing {}, built by an older recipe", path.display()));
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

fn is_made_by_a_recipe(name: &str, begin: &str, end: &str) -> bool {
    let Some(middle) = name.strip_prefix(begin).and_then(|rest| rest.strip_suffix(end)) else { return false };
    let is_digest = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    middle.is_empty() || middle.strip_prefix('-').is_some_and(is_digest)
}

fn configure(tree: &Path) -> Result<()> {
    let units = tree.join("etc/systemd/system");
    let write = |path: PathBuf, text: &str| fs::write(&path, text).with_context(|| path.display().to_string());
    write(tree.join("etc/hostname"), "gpu-sampler-vm\n")?;
    write(units.join("guest.service"), UNIT)?;
    write(units.join("emergency.service"), EMERGENCY)?;
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    // Equivalent to `systemctl enable`, `disable` and `set-default`; the systemctl in the tree requires a mounted /proc.
    link(Path::new("../guest.service"), &units.join("multi-user.target.wants/guest.service"))?;
    link(Path::new("/lib/systemd/system/multi-user.target"), &units.join("default.target"))?;
    for entry in fs::read_dir(&units).with_context(|| units.display().to_string())? {
        let folder = entry?.path();
        for unit in QUIET.iter().filter(|_| folder.extension().is_some_and(|end| end == "wants")) {
            let wanted = folder.join(unit);
            if wanted.is_symlink() {
                fs::remove_file(&wanted).with_context(|| wanted.display().to_string())?;
            }
        }
    }
    let packages = tree.join("var/cache/apt/archives");
    fs::remove_dir_all(&packages).with_context(|| packages.display().to_string())
}

fn link(target: &Path, at: &Path) -> Result<()> {
    if at.is_symlink() {
        fs::remove_file(at)?;
    }
    std::os::unix::fs::symlink(target, at).with_context(|| at.display().to_string())
}

/// Makes a file system with the contents of a folder.
pub fn make_ext4(tree: &Path, image: &Path, bytes: u64) -> Result<()> {
    let file = fs::File::create(image).with_context(|| image.display().to_string())?;
    file.set_len(bytes).with_context(|| image.display().to_string())?;
    tools::run(program("mkfs.ext4")?.args(MKFS_OPTIONS).arg("-d").arg(tree).arg(image))
}

/// FNV-1a, 32 bits; each text is followed by a byte that no text contains.
pub fn digest(texts: &[&str]) -> u32 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0xff]));
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kernel_has_the_suite_of_its_package() {
        for (release, suite) in [
            ("7.3.4+deb13-cloud-amd64", "trixie"),
            ("6.12.95+deb12-cloud-amd64", "bookworm"),
            ("6.1.0-50-cloud-amd64", "bookworm"),
            ("5.10.0-32-cloud-amd64", "bookworm"),
        ] {
            assert_eq!(suite_of(release), suite, "{release}");
        }
    }

    #[test]
    fn another_recipe_has_another_digest() {
        assert_ne!(digest(&["a", "b"]), digest(&["a", "c"]));
        assert_ne!(digest(&["ab", "c"]), digest(&["a", "bc"]));
    }

    #[test]
    fn only_images_of_that_suite_are_removed() {
        let check = |name, expect| assert_eq!(is_made_by_a_recipe(name, "root-bookworm", ".ext4"), expect, "{name}");
        check("root-bookworm-0123abcd.ext4", true);
        check("root-bookworm.ext4", true);
        check("root-bookworm-backports-0123abcd.ext4", false);
        check("root-trixie-0123abcd.ext4", false);
        check("root-bookworm-0123abcd", false);
    }
}
