//! The fuzz harnesses: unit tests that are called `fuzz_NAME`. They are found in the sources, so a list needs no build.

use crate::tools;
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
};

const SOURCES: &str = "sampler/";
const START: &str = "fn fuzz_";

/// A harness, with the package and the file that have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    pub package: String,
    pub file: String,
}

impl Target {
    /// The folder of its kept inputs and its findings, next to the file.
    pub fn folder(&self) -> PathBuf {
        tools::root().join(&self.file).with_file_name("__fuzz__").join(&self.name)
    }
}

/// All harnesses, by file and name.
pub fn all() -> Result<Vec<Target>> {
    let mut all = Vec::new();
    for (file, text) in tools::tracked_texts()? {
        if !(file.starts_with(SOURCES) && file.ends_with(".rs")) {
            continue;
        }
        for name in names(&text).with_context(|| file.clone())? {
            all.push(Target { name, package: package(&file)?, file: file.clone() });
        }
    }
    all.sort_by(|a, b| (&a.file, &a.name).cmp(&(&b.file, &b.name)));
    Ok(all)
}

/// The names of the harnesses in a file. Each has its name in the call of the engine, too, which finds its inputs by it.
fn names(text: &str) -> Result<Vec<String>> {
    const CALL: &str = "devkit::fuzz(file!(), \"";
    let mut names = Vec::new();
    for at in text.match_indices(START).map(|(at, _)| at + START.len()) {
        let Some((name, body)) = text[at..].split_once("() {") else { continue };
        let named = body.split_once(CALL).and_then(|(_, rest)| rest.split('"').next());
        if named != Some(name) {
            bail!("fuzz_{name} does not call {CALL}{name}\", ..)");
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

/// The name of the package that a file belongs to: of the nearest manifest.
fn package(file: &str) -> Result<String> {
    let root = tools::root();
    let manifest = Path::new(file).ancestors().map(|folder| root.join(folder).join("Cargo.toml")).find(|path| path.is_file());
    let text = fs::read_to_string(manifest.with_context(|| format!("{file} belongs to no package"))?)?;
    let name = text.lines().find_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    name.map(str::to_owned).with_context(|| format!("the manifest of {file} has no name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harnesses_are_found_by_the_name_of_their_test() -> Result<()> {
        let call = |name: &str| format!("devkit::fuzz(file!(), \"{name}\", |bytes| ..)");
        let text = format!("fn fuzz_a() {{\n {} }}\n fn other() {{}}\n fn fuzz_b() {{ let x = 1; {} }}", call("a"), call("b"));
        assert_eq!(names(&text)?, ["a", "b"]);
        assert!(names(&format!("fn fuzz_a() {{ {} }}", call("b"))).is_err());
        assert!(names("fn fuzz_a() { }").is_err());
        Ok(())
    }

    #[test]
    fn every_harness_has_kept_inputs_and_a_name_of_its_own() -> Result<()> {
        let all = all()?;
        for target in &all {
            let kept = fs::read_dir(target.folder().join("corpus")).with_context(|| target.folder().display().to_string())?;
            assert!(kept.count() > 0, "{target:?}");
            assert_eq!(all.iter().filter(|other| other.name == target.name).count(), 1, "{target:?}");
        }
        Ok(())
    }
}
