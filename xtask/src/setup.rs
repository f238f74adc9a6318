//! `setup`: finds what is missing to build the kernel program and to run the tests, and installs it.
//!
//! On Debian and its derivatives it installs as root; elsewhere it prints exactly what to install. It changes nothing outside the package
//! manager and `target/tools`.

use crate::{
    arch::Arch,
    debian, ebpf, pinned, sys,
    tools::{self, on_path, output, progress, run},
};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeSet,
    fmt,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

const LINKER_VERSION: &str = "0.13.0";
/// The LLVM versions that bpf-linker 0.13.0 can be built with.
const LINKER_LLVMS: std::ops::RangeInclusive<u32> = 21..=23;
/// The LLVM of Debian's own rustc-web.
const DEBIAN_LLVM: u32 = 22;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Requirements to build the kernel program.
    Ebpf,
    /// The same, and the engines that the tests use.
    Tests,
    /// Requirements to make and boot virtual machines.
    Vm,
    /// Requirements to build and check packages.
    Packages,
    /// Requirements to build the programs of other projects that the benches compare with.
    Peers,
    /// Requirements to build for another architecture, and to start what was built.
    Cross(Arch),
}

enum Missing {
    /// The standard library for that architecture.
    Library(Arch),
    /// Debian packages, and what they provide.
    Packages {
        what: String,
        packages: Vec<String>,
    },
    Linker {
        llvm: u32,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library(arch) => write!(f, "Rust's standard library for {}: rustup target add {0}", arch.triple()),
            Self::Packages { what, packages } => write!(f, "{what}: {}", packages.join(" ")),
            Self::Linker { llvm } => {
                write!(f, "bpf-linker {LINKER_VERSION} into target/tools: ")?;
                let prefix = llvm_prefix(*llvm).unwrap_or_else(|| debian_llvm(*llvm));
                write!(f, "LLVM_PREFIX={} cargo {}", prefix.display(), linker_args(*llvm).join(" "))
            }
        }
    }
}

pub fn verb(args: &[String]) -> Result<()> {
    let (mut check, mut yes) = (false, false);
    for word in args {
        match word.as_str() {
            "--check" => check = true,
            "--yes" | "-y" => yes = true,
            _ => return Err(tools::unknown(word)),
        }
    }
    if !check {
        return ensure(Scope::Tests, yes);
    }
    let missing = missing(Scope::Tests);
    if missing.is_empty() {
        progress("setup: nothing is missing");
        return Ok(());
    }
    for item in &missing {
        println!("{item}");
    }
    bail!("{} missing; `cargo xtask setup` installs them", missing.len());
}

/// Installs what is missing for `scope`; usually that is nothing.
pub fn ensure(scope: Scope, yes: bool) -> Result<()> {
    let lacking = missing(scope);
    if lacking.is_empty() {
        progress("setup: nothing is missing");
        return Ok(());
    }
    progress("setup: to be installed:");
    for item in &lacking {
        eprintln!("  {item}");
    }
    let packages = packages_of(&lacking);
    if !packages.is_empty() {
        if on_path("apt-get").is_none() || !Path::new("/etc/debian_version").exists() {
            bail!("cannot install packages on this system: install the above (Debian package names) by hand, then repeat");
        }
        if !sys::is_root() {
            bail!("installing packages requires root: run `apt-get install {}`, then repeat", packages.join(" "));
        }
    }
    if !yes && io::stdin().is_terminal() && !confirm()? {
        bail!("nothing was installed");
    }
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    // The installed packages decide which linker is needed.
    for item in missing(scope) {
        match item {
            Missing::Linker { llvm } => install_linker(llvm)?,
            Missing::Library(arch) => {
                run(Command::new("rustup").args(["target", "add", &arch.triple()]).current_dir(tools::root()))?
            }
            Missing::Packages { .. } => bail!("still missing after the installation: {item}"),
        }
    }
    let still = missing(scope);
    if let Some(item) = still.first() {
        bail!("still missing after the installation: {item}");
    }
    progress("setup: complete");
    Ok(())
}

fn confirm() -> Result<bool> {
    eprint!("Install these now? [Y/n] ");
    io::stderr().flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

fn packages_of(missing: &[Missing]) -> Vec<String> {
    let mut names = BTreeSet::new();
    for item in missing {
        if let Missing::Packages { packages, .. } = item {
            names.extend(packages.iter().cloned());
        }
    }
    names.into_iter().collect()
}

fn missing(scope: Scope) -> Vec<Missing> {
    match scope {
        Scope::Vm => return missing_commands(&FOR_VM),
        Scope::Packages => return missing_commands(&FOR_PACKAGES),
        Scope::Peers => return missing_for_peers(),
        Scope::Cross(arch) => return missing_for(arch),
        Scope::Ebpf | Scope::Tests => {}
    }
    let mut missing = missing_for_ebpf();
    if scope == Scope::Tests {
        missing.extend(missing_for_tests());
    }
    missing
}

fn packages(what: impl Into<String>, names: &[&str]) -> Missing {
    let packages = names.iter().map(|name| name.to_string()).collect();
    Missing::Packages { what: what.into(), packages }
}

fn llvm_packages(llvm: u32) -> Missing {
    let names = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
    Missing::Packages { what: format!("LLVM {llvm} to build bpf-linker with"), packages: names.into() }
}

fn missing_for_ebpf() -> Vec<Missing> {
    if ebpf::usable().is_some() {
        return Vec::new();
    }
    let mut missing = Vec::new();
    // The compiler brings the C++ standard library, which LLVM's C interface needs.
    if on_path("c++").or_else(|| on_path("g++")).is_none() {
        missing.push(packages("a C++ compiler to build bpf-linker with", &["g++"]));
    }
    let toolchains = ebpf::toolchains();
    let wanted: Vec<u32> = toolchains.iter().map(|t| t.llvm.max(*LINKER_LLVMS.start())).collect();
    let installed = wanted.iter().find_map(|llvm| (*llvm..=*LINKER_LLVMS.end()).find(|n| llvm_prefix(*n).is_some()));
    if let Some(llvm) = installed {
        missing.push(Missing::Linker { llvm });
        return missing;
    }
    // Outside Debian the available packages are unknown: the version that fits the installed toolchain is named.
    let is_available = |llvm: &u32| on_path("apt-cache").is_none() || offered(&format!("llvm-{llvm}-dev"));
    let known = wanted.into_iter().filter(|llvm| LINKER_LLVMS.contains(llvm)).find(is_available);
    if known.is_none() {
        let version = env!("CARGO_PKG_RUST_VERSION");
        let what = format!("a Rust toolchain, {version} or newer, with the library sources (or `rustup component add rust-src`)");
        missing.push(packages(what, &["rustc-web", "cargo-web", "rust-web-src"]));
    }
    let llvm = known.unwrap_or(DEBIAN_LLVM);
    if llvm_prefix(llvm).is_none() {
        missing.push(llvm_packages(llvm));
    }
    missing.push(Missing::Linker { llvm });
    missing
}

/// Description, command, package.
type Wanted = (&'static str, &'static str, &'static str);

const QEMU: &str = "qemu-system-x86";
const FOR_VM: [Wanted; 7] = [
    ("the emulator", "qemu-system-x86_64", QEMU),
    ("debootstrap, to make root file systems", "debootstrap", "debootstrap"),
    ("the ext4 tools", "mkfs.ext4", "e2fsprogs"),
    ("the kernel module tools", "depmod", "kmod"),
    ("xz, to decompress modules", "xz", "xz-utils"),
    ("zstd, to decompress modules", "zstd", "zstd"),
    ("unshare, for debootstrap's namespaces", "unshare", "util-linux"),
];

const FOR_PEERS: [Wanted; 3] = [
    ("protoc, to build all-smi with", "protoc", "protobuf-compiler"),
    ("clang, to build rezolus with", "clang", "clang"),
    ("pkg-config, to build rezolus with", "pkg-config", "pkg-config"),
];

const FOR_PACKAGES: [Wanted; 3] = [
    ("dpkg-shlibdeps, for the libraries that a .deb depends on", "dpkg-shlibdeps", "dpkg-dev"),
    ("rpm, to check packages", "rpm", "rpm"),
    ("man, to check manual pages", "man", "man-db"),
];

/// Those of an architecture that is not this machine's.
fn missing_for(arch: Arch) -> Vec<Missing> {
    if arch.is_host() {
        return Vec::new();
    }
    let (compiler, emulator, debian) = (arch.compiler(), arch.emulator(), arch.debian());
    let wanted = [
        ("a C compiler", on_path(&compiler).is_some(), format!("gcc-{}-linux-gnu", arch.name().replace('_', "-"))),
        (
            "the C library",
            Path::new(&format!("/usr/{}-linux-gnu/include/stdlib.h", arch.name())).exists(),
            format!("libc6-dev-{debian}-cross"),
        ),
        ("an emulator of its programs", on_path(&emulator).is_some(), "qemu-user-static".to_owned()),
    ];
    let lacking = wanted.iter().filter(|(_, is_there, _)| !is_there);
    let mut missing: Vec<Missing> =
        lacking.map(|(what, _, package)| packages(format!("{what} for {}", arch.name()), &[package])).collect();
    let folder = output("rustc", &["--print", "target-libdir", "--target", &arch.triple()]);
    if folder.is_none_or(|folder| !Path::new(folder.trim()).exists()) {
        missing.push(Missing::Library(arch));
    }
    missing
}

fn missing_commands(wanted: &[Wanted]) -> Vec<Missing> {
    let lacking = wanted.iter().filter(|(_, command, _)| on_path(command).is_none());
    lacking.map(|(what, _, package)| packages(*what, &[package])).collect()
}

fn missing_for_tests() -> Vec<Missing> {
    let commands = [
        ("Docker Engine", "dockerd", "docker.io"),
        ("containerd", "containerd", "containerd"),
        ("containerd's shim", "containerd-shim-runc-v2", "containerd"),
        ("containerd's client", "ctr", "containerd"),
        ("runc", "runc", "runc"),
        ("crun", "crun", "crun"),
        ("podman", "podman", "podman"),
        ("podman's monitor", "conmon", "conmon"),
        ("systemd, as the manager of an engine", "systemctl", "systemd"),
        ("iptables, which dockerd requires", "iptables", "iptables"),
        ("curl, a client with TLS", "curl", "curl"),
        ("Prometheus", "prometheus", "prometheus"),
        ("promtool", "promtool", "prometheus"),
        ("Chromium", "chromium", "chromium"),
        ("chromedriver", "chromedriver", "chromium-driver"),
    ];
    let mut missing = missing_commands(&commands);
    // A venv takes its pip from ensurepip, which Debian packages separately.
    if output("python3", &["-c", "import ensurepip, venv"]).is_none() {
        missing.push(packages("Python with venv", &["python3", "python3-venv"]));
    }
    missing
}

fn missing_for_peers() -> Vec<Missing> {
    let mut missing = missing_commands(&FOR_PEERS);
    let headers = [
        ("protoc's own messages, to build all-smi with", "google/protobuf/timestamp.proto", "libprotobuf-dev"),
        ("libdrm, to build all-smi with", "libdrm/drm.h", "libdrm-dev"),
        ("libelf, to build rezolus with", "libelf.h", "libelf-dev"),
        ("zlib, to build rezolus with", "zlib.h", "zlib1g-dev"),
    ];
    let lacking = headers.iter().filter(|(_, header, _)| !Path::new("/usr/include").join(header).exists());
    missing.extend(lacking.map(|(what, _, package)| packages(*what, &[package])));
    missing
}

fn debian_llvm(llvm: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{llvm}"))
}

/// The prefix of an LLVM of that major version with all that is needed to build a linker.
fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let debian = debian_llvm(llvm);
    if debian.join("bin/llvm-config").exists() {
        let complete = debian.join("include/llvm-c/Core.h").exists() && debian.join("lib/libPolly.a").exists();
        return complete.then_some(debian);
    }
    let config = [format!("llvm-config-{llvm}"), "llvm-config".into()];
    let config = config
        .iter()
        .filter_map(|name| on_path(name))
        .find(|config| output(config, &["--version"]).is_some_and(|version| version.starts_with(&format!("{llvm}."))))?;
    let prefix = PathBuf::from(output(config, &["--prefix"])?.trim());
    prefix.join("include/llvm-c/Core.h").exists().then_some(prefix)
}

/// Whether the package manager has an installable version of the package.
fn offered(package: &str) -> bool {
    output("apt-cache", &["policy", package])
        .is_some_and(|text| text.lines().any(|line| line.contains("Candidate:") && !line.contains("(none)")))
}

fn apt_get(args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
    command
}

fn install_packages(packages: &[String]) -> Result<()> {
    run(&mut apt_get(&["update"]))?;
    let plain = ["install", "-y", "--no-install-recommends"];
    if packages.iter().any(|name| name == QEMU) && !fits(packages) {
        return install_from_backports(packages);
    }
    run(apt_get(&plain).args(packages))
}

/// Whether the packages can be installed without removing others.
fn fits(packages: &[String]) -> bool {
    let names = packages.iter().map(String::as_str);
    let args: Vec<&str> = ["install", "--simulate", "--no-install-recommends"].into_iter().chain(names).collect();
    output("apt-get", &args).is_some_and(|plan| !plan.lines().any(|line| line.starts_with("Remv ")))
}

/// Installs from the backports: with newer parts of qemu installed, the suite's own emulator is not installable, but that of the
/// backports is.
fn install_from_backports(packages: &[String]) -> Result<()> {
    let mirror = debian::mirror().with_context(|| format!("{} cannot be installed", packages.join(" ")))?;
    let dir = tools::target_dir()?.join("vm/backports");
    std::fs::create_dir_all(dir.join("lists/partial")).with_context(|| dir.display().to_string())?;
    let (suite, backports) = (&mirror.codename, format!("{}-backports", mirror.codename));
    let sources = dir.join("sources.list");
    std::fs::write(&sources, mirror.source(suite) + &mirror.source(&backports))?;
    let settings = [
        format!("Dir::State::Lists={}", dir.join("lists").display()),
        format!("Dir::Etc::sourcelist={}", sources.display()),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
    ];
    let with = |args: &[&str]| {
        let mut command = apt_get(&[]);
        settings.iter().for_each(|setting| {
            command.args(["-o", setting]);
        });
        command.args(args);
        command
    };
    run(&mut with(&["update"]))?;
    run(with(&["install", "-y", "--no-install-recommends", "-t", &backports]).args(packages))
}

fn linker_args(llvm: u32) -> Vec<String> {
    let feature = format!("llvm-{llvm}");
    let words = ["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--no-default-features"];
    let more = ["--features", &feature, "--root", "target/tools"];
    words.iter().chain(&more).map(|word| word.to_string()).collect()
}

fn install_linker(llvm: u32) -> Result<()> {
    let prefix = llvm_prefix(llvm).with_context(|| format!("LLVM {llvm} is not installed"))?;
    progress("setup: building bpf-linker from source, which takes a minute or two");
    let mut cargo = pinned::cargo()?;
    cargo.env("LLVM_PREFIX", prefix).args(linker_args(llvm));
    // An installed linker that cannot start, or is too old, has to be replaced.
    if ebpf::linker().exists() {
        cargo.arg("--force");
    }
    run(&mut cargo)
}
