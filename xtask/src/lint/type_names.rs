//! No two types of a package share a name, so that a name in a message, a search or a document has one meaning. The types that the
//! glossary names exist.

use crate::tools;
use anyhow::{Context as _, Result, bail};
use std::{collections::BTreeMap, fs, path::Path};
use syn::visit::{self, Visit};

/// What several modules of a package may have.
const SHARED: [&str; 3] = ["Config", "Error", "Stats"];
const GLOSSARY: &str = "docs/glossary.md";
/// The packages that the glossary is about.
const AGENT: &str = "sampler";

pub fn check() -> Result<()> {
    tools::progress("type names, and those of the glossary");
    let mut files: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (name, text) in tools::tracked_texts()?.into_iter().filter(|(name, _)| name.ends_with(".rs")) {
        for defined in types(&text).with_context(|| name.clone())? {
            files.entry((package(&name), defined)).or_default().push(name.clone());
        }
    }
    let twice = files.iter().filter(|((_, name), files)| files.len() > 1 && !SHARED.contains(&name.as_str()));
    let twice = twice.map(|((package, name), files)| format!("{package}: `{name}` is defined in {}", files.join(" and ")));
    let glossary = fs::read_to_string(tools::root().join(GLOSSARY))?;
    let is_defined = |carrier: &str| files.keys().any(|(package, name)| package.starts_with(AGENT) && name == carrier);
    let missing = carriers(&glossary).filter(|carrier| !is_defined(carrier));
    let problems: Vec<String> =
        twice.chain(missing.map(|missing| format!("{GLOSSARY}: no type is called `{missing}`"))).collect();
    if problems.is_empty() {
        return Ok(());
    }
    bail!("{}", problems.join("\n"));
}

/// The folder of the package to which a file belongs: the nearest with a manifest.
fn package(file: &str) -> String {
    let root = tools::root();
    let folder = Path::new(file).ancestors().find(|folder| root.join(folder).join("Cargo.toml").is_file());
    folder.unwrap_or(Path::new("")).display().to_string()
}

/// The types in the last column of the glossary's tables.
fn carriers(glossary: &str) -> impl Iterator<Item = &str> {
    let last = |line: &'_ str| line.trim_end().strip_suffix("` |").and_then(|rest| rest.rfind('`').map(|at| at + 1));
    glossary.lines().filter_map(move |line| last(line).map(|at| line[at..].trim_end().trim_end_matches("` |")))
}

/// The structs, enums, traits and aliases of a file, those inside functions left out.
fn types(text: &str) -> Result<Vec<String>> {
    let mut names = Names(Vec::new());
    names.visit_file(&syn::parse_file(text)?);
    Ok(names.0)
}

struct Names(Vec<String>);

impl Visit<'_> for Names {
    fn visit_item(&mut self, item: &syn::Item) {
        match item {
            syn::Item::Struct(item) => self.0.push(item.ident.to_string()),
            syn::Item::Enum(item) => self.0.push(item.ident.to_string()),
            syn::Item::Union(item) => self.0.push(item.ident.to_string()),
            syn::Item::Trait(item) => self.0.push(item.ident.to_string()),
            syn::Item::Type(item) => self.0.push(item.ident.to_string()),
            // A local type is not visible elsewhere.
            syn::Item::Fn(_) | syn::Item::Impl(_) => {}
            _ => visit::visit_item(self, item),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_nested_modules_count_and_local_ones_do_not() -> Result<()> {
        let text = "struct A; mod tests { enum B { X } } fn f() { struct C; } type D = u8; impl T for A { type E = u8; }";
        assert_eq!(types(text)?, ["A", "B", "D"]);
        Ok(())
    }
    #[test]
    fn the_last_column_of_the_glossary_names_types() {
        let glossary = "| fact | One statement. | `Fact` |\n| `x` | no carrier |\n";
        assert_eq!(carriers(glossary).collect::<Vec<_>>(), ["Fact"]);
    }

    #[test]
    fn a_file_belongs_to_the_nearest_package() {
        let packages =
            ["sampler/src/main.rs", "sampler/core/src/lib.rs", "tests/all.rs", "tests/nvml-sim/src/lib.rs"].map(package);
        assert_eq!(packages, ["sampler", "sampler/core", "tests", "tests/nvml-sim"]);
    }
}
