//! `dist`: builds a tarball with the agent, its licences, README and deployment files.

use crate::{
    build::{self, Profile},
    setup,
    tools::{self, run},
};
use anyhow::{Context, Result};
use std::{env, fs, path::Path, process::Command};

/// Files and folders that go next to the binary, where present.
const EXTRAS: [&str; 5] = ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0", "README.md", "deploy"];

pub fn verb(args: &[String]) -> Result<()> {
    tools::no_arguments(args)?;
    setup::ensure(setup::Scope::Ebpf, false)?;
    let built = build::everything(Profile::Release)?;
    let name = format!("gpu-sampler-{}-{}-linux", env!("CARGO_PKG_VERSION"), env::consts::ARCH);
    let out = tools::root().join("target/dist");
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
    println!("{}", archive.display());
    Ok(())
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
