//! Builds the kernel program into `target/ebpf-object/sampler-ebpf.o`.
//!
//! It needs core's sources, because there is no compiled core for BPF, and a linker with an LLVM at least as new as the compiler's. Any
//! toolchain with the sources works: rustup's with rust-src, or a distribution's.

use crate::{
    arch::Arch,
    tools::{self, forget_cargo, output, progress},
};
use anyhow::{Context, Result, bail};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

pub struct Toolchain {
    pub prefix: PathBuf,
    /// Major version of its LLVM.
    pub llvm: u32,
}

pub fn verb(args: &[String]) -> Result<()> {
    tools::no_arguments(args)?;
    build(Arch::host()?)
}

pub fn linker() -> PathBuf {
    tools::root().join("target/tools/bin/bpf-linker")
}

/// Major version of the LLVM that the installed linker was built with; `None` if it is missing or cannot start.
pub fn linker_llvm() -> Option<u32> {
    let linker = linker();
    output(&linker, &["--version"])?;
    let libraries = output("ldd", &[linker.to_str()?])?;
    let (_, after) = libraries.split_once("libLLVM")?;
    let digits = after.trim_start_matches(['.', '-']).trim_start_matches("so.");
    leading_number(digits)
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

/// (major, minor) of a version such as "1.95.0-nightly".
fn release(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(leading_number);
    Some((parts.next()??, parts.next()??))
}

fn probe(prefix: &Path) -> Option<Toolchain> {
    let rustc = prefix.join("bin/rustc");
    let sysroot = PathBuf::from(output(&rustc, &["--print", "sysroot"])?.trim());
    if !sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs").exists() {
        return None;
    }
    let version = output(&rustc, &["-vV"])?;
    if release(field(&version, "release:")?) < release(env!("CARGO_PKG_RUST_VERSION")) {
        return None;
    }
    let llvm = leading_number(field(&version, "LLVM version:")?)?;
    prefix.join("bin/cargo").exists().then(|| Toolchain { prefix: prefix.to_path_buf(), llvm })
}

/// Every installed toolchain that can compile for BPF, the preferred one first.
pub fn toolchains() -> Vec<Toolchain> {
    let rustup = env::var_os("RUSTUP_HOME").map(PathBuf::from);
    let rustup = rustup.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")));
    let folder = rustup.and_then(|home| fs::read_dir(home.join("toolchains")).ok());
    let mut prefixes: Vec<PathBuf> = folder.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    prefixes.sort();
    prefixes.push("/usr".into());
    prefixes.iter().filter_map(|prefix| probe(prefix)).collect()
}

/// The toolchain that works with the installed linker.
pub fn usable() -> Option<Toolchain> {
    let newest = linker_llvm()?;
    toolchains().into_iter().find(|toolchain| toolchain.llvm <= newest)
}

pub fn build(arch: Arch) -> Result<()> {
    build_program(arch, "sampler-ebpf", &arch.ebpf_object())
}

/// Builds the program with which the benches compare ways of storing process facts.
pub fn build_storage_bench() -> Result<PathBuf> {
    let object = tools::root().join("target/ebpf-bench/storage.o");
    build_program(Arch::host()?, "storage", &object)?;
    Ok(object)
}

fn build_program(arch: Arch, name: &str, to: &Path) -> Result<()> {
    let toolchain = usable().context("a toolchain or linker for the kernel program is missing: run `cargo xtask setup`")?;
    let prefix = &toolchain.prefix;
    progress(format_args!("kernel program: with {} (LLVM {})", prefix.display(), toolchain.llvm));
    // A folder for each: their flags differ, and each would be built again after the other.
    let target_dir = arch.folder("bpf");
    let mut cargo = Command::new(prefix.join("bin/cargo"));
    forget_cargo(&mut cargo);
    for name in [
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_LINKER",
    ] {
        cargo.env_remove(name);
    }
    // The flags replace those of any cargo configuration; \x1f is cargo's separator.
    let arch = arch.name();
    let flags = format!("--cfg=bpf_target_arch=\"{arch}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf");
    cargo
        .current_dir(tools::root())
        .env("RUSTC", prefix.join("bin/rustc"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker())
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .args(["build", "--locked", "--profile", "ebpf", "--package", "sampler-ebpf", "--bin", name])
        .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core", "--target-dir"])
        .arg(&target_dir);
    if !cargo.status().with_context(|| prefix.display().to_string())?.success() {
        bail!("building the kernel program failed");
    }
    publish(&target_dir.join("bpfel-unknown-none/ebpf").join(name), to)
}

/// Copies the object only if it changed, atomically, so that packages that embed it are not rebuilt without need.
fn publish(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| from.display().to_string())?;
    if fs::read(to).ok().as_ref() == Some(&new) {
        return Ok(());
    }
    let folder = to.parent().context("the object is in a folder")?;
    fs::create_dir_all(folder)?;
    // Next to the folder, not in it: the agent's build script watches the folder.
    let unfinished = folder.with_extension(format!("tmp{}", std::process::id()));
    fs::write(&unfinished, &new)?;
    fs::rename(&unfinished, to).with_context(|| to.display().to_string())?;
    progress(format_args!("kernel program: {} bytes in {}", new.len(), to.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed_and_compared() {
        assert_eq!(release("1.97.0-nightly"), Some((1, 97)));
        assert_eq!(release("1.95"), Some((1, 95)));
        assert!(release("1.100.0") > release("1.95.0"));
        assert_eq!(release("x"), None);
        assert_eq!(leading_number("22.1.8"), Some(22));
        assert_eq!(leading_number(""), None);
    }
}
