//! `dist`: builds a tarball with the agent, its licences, README and deployment files, and a list of the crates in it (SPDX), or one with the
//! simulator and the program that scores exporters. `SHA256SUMS` covers these and the packages of `cargo xtask package`.

use crate::{
    arch::Arch,
    build,
    pinned::{self, Program},
    setup,
    tools::{self, run},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Files and folders that go next to the binary.
const EXTRAS: [&str; 5] = ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0", "README.md", "deploy"];
/// The word for the simulator's tarball instead of the agent's.
const SIMULATOR: &str = "simulator";
/// What goes next to the simulator, by name there.
const OF_SIMULATOR: [(&str, &str); 8] = [
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("tests/nvml-sim/README.md", "nvml-sim/README.md"),
    ("tests/cuda-sim/README.md", "cuda-sim/README.md"),
    ("tests/gpu-accuracy/README.md", "gpu-accuracy/README.md"),
    ("tests/gpu-accuracy/Dockerfile", "gpu-accuracy/Dockerfile"),
    ("tests/gpu-accuracy/mappings", "gpu-accuracy/mappings"),
    ("tests/gpu-accuracy/stand-ins", "gpu-accuracy/stand-ins"),
];

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
    if let Some((word, rest)) = args.split_first().filter(|(word, _)| *word == SIMULATOR) {
        return simulator(Arch::of_arguments(rest)?).with_context(|| format!("dist {word}"));
    }
    let arch = Arch::of_arguments(args)?;
    setup::ensure(setup::Scope::Ebpf, false)?;
    let built = build::release(arch)?;
    let name = format!("gpu-sampler-{}-{}-linux", env!("CARGO_PKG_VERSION"), arch.name());
    let extras = EXTRAS.map(|name| (tools::root().join(name), name.to_owned()));
    let archive = archive(&name, [(built.sampler, "gpu-sampler".to_owned())].into_iter().chain(extras))?;
    let out = folder()?;
    let crates = out.join(format!("{name}.spdx.json"));
    write_sbom(arch, &crates)?;
    write_sums(&out)?;
    println!("{}\n{}", archive.display(), crates.display());
    Ok(())
}

/// The simulated driver, with its CUDA library, and the program that scores exporters with it.
fn simulator(arch: Arch) -> Result<()> {
    let built = build::simulator(arch)?;
    let name = format!("nvml-sim-{}-{}-linux", env!("CARGO_PKG_VERSION"), arch.name());
    let programs = [built.sim, built.sim_library, built.cuda_work, built.cuda_library, built.accuracy].map(|path| {
        let name = format!("bin/{}", path.file_name().unwrap_or_default().display());
        (path, name)
    });
    let extras = OF_SIMULATOR.map(|(from, to)| (tools::root().join(from), to.to_owned()));
    let archive = archive(&name, programs.into_iter().chain(extras))?;
    write_sums(&folder()?)?;
    println!("{}", archive.display());
    Ok(())
}

/// Makes a tarball of these files and folders, below a folder with its name. Equal content gives equal bytes.
fn archive(name: &str, files: impl Iterator<Item = (PathBuf, String)>) -> Result<PathBuf> {
    let out = folder()?;
    let folder = out.join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    for (from, to) in files {
        let to = folder.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&folder))?;
        copy(&from, &to)?;
    }
    let archive = out.join(format!("{name}.tar.gz"));
    run(Command::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-czf"])
        .arg(&archive)
        .arg("-C")
        .arg(&out)
        .arg(name))?;
    fs::remove_dir_all(&folder)?;
    Ok(archive)
}

/// Writes the list of all crates in the program, with versions and licences, as SPDX 2.3. It is validated.
fn write_sbom(arch: Arch, to: &Path) -> Result<()> {
    let mut sbom = Command::new(CARGO_SBOM.ensure()?);
    tools::forget_cargo(&mut sbom).current_dir(tools::root());
    sbom.args(["--output-format", "spdx_json_2_3", "--cargo-package", "gpu-sampler"]);
    tools::progress(tools::shown(&sbom));
    let output = sbom.output().context("cargo-sbom")?;
    if !output.status.success() {
        bail!("cargo-sbom: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut document: Value = serde_json::from_slice(&output.stdout).context("cargo-sbom does not print JSON")?;
    complete(&mut document, &crates(arch)?)?;
    make_reproducible(&mut document)?;
    fs::write(to, format!("{}\n", serde_json::to_string_pretty(&document)?)).with_context(|| to.display().to_string())?;
    run(Command::new(pinned::of_pypi(&[SPDX_TOOLS], "pyspdxtools")?).arg("--infile").arg(to))
}

/// The crates that the program of this architecture is built from, as `NAME VERSION`.
fn crates(arch: Arch) -> Result<BTreeSet<String>> {
    let target = arch.triple();
    let args =
        ["tree", "--package", "gpu-sampler", "--edges", "normal,build", "--prefix", "none", "--locked", "--target", &target];
    let output = tools::cargo(&args)?.output().context("cargo tree")?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr).trim());
    let name = |line: &str| {
        let (name, rest) = line.split_once(" v")?;
        Some(format!("{name} {}", rest.split_whitespace().next()?))
    };
    Ok(String::from_utf8(output.stdout)?.lines().filter_map(name).collect())
}

/// Removes crates of other platforms, which cargo-sbom lists as well, and gives the others the address that they are downloaded from, which
/// it does not know.
fn complete(document: &mut Value, crates: &BTreeSet<String>) -> Result<()> {
    let packages = document["packages"].as_array_mut().context("the document has no packages")?;
    let mut others = BTreeSet::new();
    packages.retain(|package| {
        let kept = crates.contains(&format!("{} {}", text(package, "name"), text(package, "versionInfo")));
        if !kept {
            others.insert(text(package, "SPDXID").to_owned());
        }
        kept
    });
    ensure!(packages.len() == crates.len(), "{} packages for {} crates", packages.len(), crates.len());
    for package in packages {
        if text(package, "downloadLocation").starts_with("registry+") {
            let (name, version) = (text(package, "name"), text(package, "versionInfo"));
            package["downloadLocation"] = format!("https://crates.io/api/v1/crates/{name}/{version}/download").into();
        }
    }
    let relationships = document["relationships"].as_array_mut().context("the document has no relationships")?;
    relationships.retain(|one| ["spdxElementId", "relatedSpdxElement"].iter().all(|end| !others.contains(text(one, end))));
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// The document's time is that of the commit, its name contains the commit: equal content gives equal bytes.
fn make_reproducible(document: &mut Value) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_other_platforms_are_removed() {
        let package = |name: &str, location: &str| serde_json::json!({"SPDXID": format!("id-{name}"), "name": name, "versionInfo": "1.0.0", "downloadLocation": location});
        let uses = |name: &str| serde_json::json!({"spdxElementId": "id-own", "relatedSpdxElement": format!("id-{name}")});
        let mut document = serde_json::json!({
            "packages": [package("own", "NONE"), package("used", "registry+x"), package("other", "registry+x")],
            "relationships": [uses("used"), uses("other")],
        });
        let crates = BTreeSet::from(["own 1.0.0".to_owned(), "used 1.0.0".to_owned()]);
        complete(&mut document, &crates).unwrap();
        let used = package("used", "https://crates.io/api/v1/crates/used/1.0.0/download");
        let expected = serde_json::json!({"packages": [package("own", "NONE"), used], "relationships": [uses("used")]});
        assert_eq!(document, expected);
        assert!(complete(&mut document, &BTreeSet::from(["missing 1.0.0".to_owned()])).is_err());
    }
}
