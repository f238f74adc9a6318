//! A Debian root file system with systemd and container engines, made once per suite.

use super::apt::Apt;
use crate::{
    janitor::{Cleanup, Leftover},
    tools::{self, say},
};
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// systemd, what tests use, and engines with their helpers. All exist in bookworm and in trixie.
const PACKAGES: &str = "systemd,systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,kmod,iproute2,procps,python3,docker.io,containerd,\
                        podman,crun,runc,uidmap,slirp4netns,fuse-overlayfs,iptables,busybox-static,ca-certificates,strace";
/// Those that trixie splits off.
const TRIXIE_PACKAGES: &str = ",docker-cli,passt,aardvark-dns";
/// Engines are started by who needs them; timers and services that only disturb.
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
/// Of the file system. Sparse: only what is written takes room here.
const IMAGE_BYTES: u64 = 6 << 30;
const UNIT: &str = include_str!("guest.service");

/// The suite whose user space goes with a kernel.
pub fn suite_of(release: &str) -> &'static str {
    if release.contains("deb13") { "trixie" } else { "bookworm" }
}

/// The image of a suite, made when it is not there. Its name has a digest of the recipe, so a changed recipe makes a new one.
pub fn ensure(apt: &Apt, vm: &Path, suite: &str, cleanup: &mut Cleanup) -> Result<PathBuf> {
    let packages = if suite == "trixie" { format!("{PACKAGES}{TRIXIE_PACKAGES}") } else { PACKAGES.to_owned() };
    let image = vm.join(format!("root-{suite}-{:08x}.ext4", digest(&[&packages, UNIT, &QUIET.join(" ")])));
    if image.exists() {
        return Ok(image);
    }
    say(format_args!("vm: a root file system of {suite} is made once; that takes some minutes"));
    let tree = vm.join(format!("root-{suite}-{}", std::process::id()));
    cleanup.will_remove(&Leftover::Tree(tree.clone()))?;
    // In namespaces of its own, so that its mounts and processes go with it, however it ends.
    let mut debootstrap = Command::new("unshare");
    debootstrap.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "debootstrap"]);
    debootstrap.args(["--variant=minbase", &format!("--include={packages}"), suite]).arg(&tree).arg(&apt.mirror);
    tools::run(&mut debootstrap).with_context(|| format!("{}/debootstrap/debootstrap.log", tree.display()))?;
    configure(&tree)?;
    make_ext4(&tree, &image, IMAGE_BYTES)?;
    fs::remove_dir_all(&tree).with_context(|| tree.display().to_string())?;
    Ok(image)
}

fn configure(tree: &Path) -> Result<()> {
    let units = tree.join("etc/systemd/system");
    let write = |path: PathBuf, text: &str| fs::write(&path, text).with_context(|| path.display().to_string());
    write(tree.join("etc/hostname"), "gpu-sampler-vm\n")?;
    write(units.join("guest.service"), UNIT)?;
    fs::create_dir_all(units.join("multi-user.target.wants"))?;
    // As `systemctl enable`, `disable` and `set-default` do; the one in the tree wants /proc mounted there.
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

/// A file system with what lies in a folder; whole or not at all.
pub fn make_ext4(tree: &Path, image: &Path, bytes: u64) -> Result<()> {
    let unfinished = image.with_extension(format!("tmp{}", std::process::id()));
    let file = fs::File::create(&unfinished).with_context(|| unfinished.display().to_string())?;
    file.set_len(bytes)?;
    tools::run(
        Command::new("mkfs.ext4").args(["-q", "-F", "-O", "^metadata_csum,^orphan_file", "-d"]).arg(tree).arg(&unfinished),
    )?;
    fs::rename(&unfinished, image).with_context(|| image.display().to_string())
}

/// FNV-1a, 32 bits.
fn digest(texts: &[&str]) -> u32 {
    let bytes = texts.iter().flat_map(|text| text.bytes());
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_of_kernels() {
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
    }
}
