//! A container image built by hand, since there may be no registry to pull one from.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

/// Copies `sleep` and its libraries to a folder, as a container's file system.
pub fn root(dir: &Path) -> Result<()> {
    libraries(Path::new("/bin/sleep"), dir)?;
    copy("/bin/sleep", dir)
}

/// Copies the libraries of a program to a folder, at their paths.
pub fn libraries(program: &Path, dir: &Path) -> Result<()> {
    let ldd = String::from_utf8(output(Command::new("ldd").arg(program))?)?;
    ldd.split_whitespace().filter(|word| word.starts_with('/')).try_for_each(|file| copy(file, dir))
}

fn copy(file: &str, dir: &Path) -> Result<()> {
    let to = dir.join(file.trim_start_matches('/'));
    std::fs::create_dir_all(to.parent().unwrap_or(Path::new("/")))?;
    std::fs::copy(file, to).with_context(|| file.to_owned())?;
    Ok(())
}

/// What a command prints; an error with what it printed to standard error if it fails.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Writes to `dir` the archive that `docker save` would make of an image that sleeps. Different names give different images.
pub fn archive(dir: &Path, name: &str) -> Result<PathBuf> {
    let made = tempfile::tempdir()?;
    root(&made.path().join("root"))?;
    let tar = |args: &[&str]| output(Command::new("tar").current_dir(made.path()).args(args)).map(drop);
    tar(&["-C", "root", "-cf", "layer.tar", "."])?;
    let sum = String::from_utf8(output(Command::new("sha256sum").arg(made.path().join("layer.tar")))?)?;
    let layer = format!("sha256:{}", sum.split(' ').next().unwrap_or_default());
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({"architecture": arch, "os": "linux", "config": {"Cmd": ["/bin/sleep", "1000000"]},
        "rootfs": {"type": "layers", "diff_ids": [layer]}, "history": [{"comment": name}]});
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    std::fs::write(made.path().join("config.json"), config.to_string())?;
    std::fs::write(made.path().join("manifest.json"), manifest.to_string())?;
    let archive = dir.join("image.tar");
    tar(&["-cf", &archive.to_string_lossy(), "manifest.json", "config.json", "layer.tar"])?;
    Ok(archive)
}
