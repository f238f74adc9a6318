//! `dist`: builds a tarball with the agent, its licences, README and deployment files, and a list of the crates in it (SPDX). `SHA256SUMS`
//! covers these and the packages of `cargo xtask package`.

use crate::{
    build::{self, Profile},
    pinned::{self, Program},
    setup,
    tools::{self, run},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Files and folders that go next to the binary, where present.
const EXTRAS: [&str; 5] = ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0", "README.md", "deploy"];

const CARGO_SBOM: Program = Program { name: "cargo-sbom", version: "0.10.0" };
/// The reference validator of SPDX.
const SPDX_TOOLS: &str = "spdx-tools==0.8.3";
/// What a release consists of, in `target/dist`.
const RELEASED: [&str; 4] = [".tar.gz", ".spdx.json", ".deb", ".rpm"];

pub fn folder() -> Result<PathBuf> {
    let folder = tools::root().join("target/dist");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

pub fn verb(args: &[String]) -> Result<()> {
    tools::no_arguments(args)?;
    setup::ensure(setup::Scope::Ebpf, false)?;
    let built = build::everything(Profile::Release)?;
    let name = format!("gpu-sampler-{}-{}-linux", env!("CARGO_PKG_VERSION"), env::consts::ARCH);
    let out = folder()?;
    let folder = out.join(&name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    copy(&built.sampler, &folder.join("gpu-sampler"))?;
    for extra in EXTRAS {
        let from = tools::root().join(extra);
        if from.exists() {
            copy(&from, &folder.join(extra))?;
        }
    }
    let archive = out.join(format!("{name}.tar.gz"));
    // Equal content gives equal bytes.
    run(Command::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-czf"])
        .arg(&archive)
        .arg("-C")
        .arg(&out)
        .arg(&name))?;
    fs::remove_dir_all(&folder)?;
    let crates = out.join(format!("{name}.spdx.json"));
    write_sbom(&crates)?;
    write_sums(&out)?;
    println!("{}\n{}", archive.display(), crates.display());
    Ok(())
}

/// Writes the list of all crates in the program, with versions, licences and checksums, as SPDX 2.3. It is validated.
fn write_sbom(to: &Path) -> Result<()> {
    let mut sbom = Command::new(CARGO_SBOM.ensure()?);
    tools::forget_cargo(&mut sbom).current_dir(tools::root());
    sbom.args(["--output-format", "spdx_json_2_3", "--cargo-package", "gpu-sampler"]);
    tools::progress(tools::shown(&sbom));
    let output = sbom.output().context("cargo-sbom")?;
    if !output.status.success() {
        bail!("cargo-sbom: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut document: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo-sbom does not print JSON")?;
    let packages = document["packages"].as_array().context("the document has no packages")?;
    // Small parts of the graph would be a wrong root.
    ensure!(packages.len() > 100, "only {} packages", packages.len());
    make_reproducible(&mut document)?;
    fs::write(to, format!("{}\n", serde_json::to_string_pretty(&document)?)).with_context(|| to.display().to_string())?;
    run(Command::new(pinned::of_pypi(&[SPDX_TOOLS], "pyspdxtools")?).arg("--infile").arg(to))
}

/// The document's time is that of the commit, its name contains the commit: equal content gives equal bytes.
fn make_reproducible(document: &mut serde_json::Value) -> Result<()> {
    let root = tools::root();
    let path = root.to_str().context("the path of this checkout is UTF-8")?;
    let format = ["-C", path, "log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", "--format=%cd %H"];
    let commit = Command::new("git").args(format).env("TZ", "UTC").output().context("git")?;
    let text = String::from_utf8(commit.stdout)?;
    let (time, commit) = text.trim().split_once(' ').context("not a git checkout: the document has no time")?;
    document["creationInfo"]["created"] = time.into();
    document["documentNamespace"] =
        format!("https://spdx.org/spdxdocs/gpu-sampler-{}-{commit}", env!("CARGO_PKG_VERSION")).into();
    Ok(())
}

/// Writes the checksums of all that is released in this version.
pub fn write_sums(out: &Path) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let mut names: Vec<String> = fs::read_dir(out)?.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.contains(version) && RELEASED.iter().any(|end| name.ends_with(end)));
    names.sort();
    let sums = Command::new("sha256sum").args(&names).current_dir(out).output().context("sha256sum")?;
    ensure!(sums.status.success(), "sha256sum: {}", String::from_utf8_lossy(&sums.stderr).trim());
    let to = out.join("SHA256SUMS");
    fs::write(&to, sums.stdout).with_context(|| to.display().to_string())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let context = || format!("copying {}", from.display());
    if !from.is_dir() {
        fs::copy(from, to).with_context(context)?;
        return Ok(());
    }
    fs::create_dir_all(to).with_context(context)?;
    for entry in fs::read_dir(from).with_context(context)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}
