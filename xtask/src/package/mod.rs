//! `package`: builds the .deb and the .rpm from one release build into `target/dist`, and checks them.
//!
//! ```text
//!   release build -> man pages, completions, compressed changelog   target/package     (here)
//!                 -> cargo-deb, cargo-generate-rpm                  target/dist        metadata in sampler/Cargo.toml
//!                 -> contents, scripts, dependencies, pages                            (checks.rs)
//! ```

mod checks;

use crate::{
    arch::Arch,
    build::{self, Profile},
    dist,
    pinned::Program,
    setup,
    tools::{self, run},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const CARGO_DEB: Program = Program { name: "cargo-deb", version: "3.8.0" };
const CARGO_RPM: Program = Program { name: "cargo-generate-rpm", version: "0.21.1" };
/// Shells of which distributions load completions from a folder of the system.
const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

pub fn verb(args: &[String]) -> Result<()> {
    let arch = Arch::of_arguments(args)?;
    setup::ensure(setup::Scope::Ebpf, false)?;
    setup::ensure(setup::Scope::Packages, false)?;
    let built = build::release(arch)?;
    let pages = generate(arch, &built.sampler)?;
    let out = dist::folder()?;
    let deb = move_to(&out, &make_deb(arch, Profile::Release, &built.sampler, &pages)?)?;
    let rpm = make("rpm", |to| {
        let mut command = cargo_tool(CARGO_RPM)?;
        // That of rpm, which reads the files of every architecture; the builtin one runs the loader of this machine.
        command.args(["--package", "sampler", "--auto-req", "find-requires", "--output"]).arg(to);
        arch.select(&mut command);
        Ok(command)
    })?;
    let rpm = move_to(&out, &rpm)?;
    checks::rpm(arch, &rpm, &pages)?;
    dist::write_sums(&out)?;
    println!("{}\n{}", deb.display(), rpm.display());
    Ok(())
}

/// The .deb with a program that is built already, for this machine's architecture; it stays in `target/package`.
pub fn deb(profile: Profile, sampler: &Path, yes: bool) -> Result<PathBuf> {
    setup::ensure(setup::Scope::Packages, yes)?;
    let arch = Arch::host()?;
    let pages = generate(arch, sampler)?;
    make_deb(arch, profile, sampler, &pages)
}

fn make_deb(arch: Arch, profile: Profile, sampler: &Path, pages: &[String]) -> Result<PathBuf> {
    let deb = make("deb", |to| {
        let mut command = cargo_tool(CARGO_DEB)?;
        // The release profile strips.
        command.args(["--no-build", "--no-strip", "--locked", "--package", "gpu-sampler", "--output"]).arg(to);
        if profile == Profile::Debug {
            // It refuses that profile, and takes any program that is in the folder of releases.
            let folder = tools::root().join("target/package/debug");
            empty(&folder.join("release"))?;
            fs::copy(sampler, folder.join("release/gpu-sampler")).with_context(|| sampler.display().to_string())?;
            command.env("CARGO_TARGET_DIR", &folder).arg("--fast");
        }
        arch.select(&mut command);
        Ok(command)
    })?;
    checks::deb(arch, &deb, sampler, pages)?;
    Ok(deb)
}

fn cargo_tool(program: Program) -> Result<Command> {
    let mut command = Command::new(program.ensure()?);
    tools::forget_cargo(&mut command).current_dir(tools::root()).env("CARGO_TARGET_DIR", tools::target_dir()?);
    Ok(command)
}

/// Builds a package in an empty folder, where it is the only file.
fn make(end: &str, command: impl FnOnce(&Path) -> Result<Command>) -> Result<PathBuf> {
    let folder = tools::root().join("target/package").join(end);
    empty(&folder)?;
    // A path that ends with a slash is a folder to both.
    run(&mut command(&folder.join(""))?)?;
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)?.flatten().map(|entry| entry.path()).collect();
    files.pop().filter(|_| files.is_empty()).with_context(|| format!("{} has no single file", folder.display()))
}

fn move_to(out: &Path, file: &Path) -> Result<PathBuf> {
    let to = out.join(file.file_name().context("a package has a name")?);
    fs::rename(file, &to).with_context(|| to.display().to_string())?;
    Ok(to)
}

fn empty(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())
}

/// Makes what the program itself describes. The folder is fixed, because sampler/Cargo.toml names it. Returns the pages' file names.
fn generate(arch: Arch, sampler: &Path) -> Result<Vec<String>> {
    let folder = tools::root().join("target/package");
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    empty(&man)?;
    empty(&completions)?;
    run(arch.command(sampler).args(["man", "--output"]).arg(&man))?;
    for shell in SHELLS {
        let output = arch.command(sampler).args(["completions", shell]).output().context("gpu-sampler completions")?;
        if !output.status.success() {
            bail!("gpu-sampler completions {shell}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        fs::write(completions.join(format!("gpu-sampler.{shell}")), output.stdout)?;
    }
    fs::copy(tools::root().join("CHANGELOG.md"), folder.join("CHANGELOG.md")).context("CHANGELOG.md")?;
    let mut pages: Vec<PathBuf> = fs::read_dir(&man)?.flatten().map(|entry| entry.path()).collect();
    pages.sort();
    checks::pages(&pages)?;
    // Without names and times: equal content gives equal bytes.
    run(Command::new("gzip").args(["-9", "-n", "-f"]).args(&pages).arg(folder.join("CHANGELOG.md")))?;
    let name = |page: &PathBuf| page.file_name().map(|name| format!("{}.gz", name.to_string_lossy()));
    Ok(pages.iter().filter_map(name).collect())
}
