//! No two types of a package share a name: a name in a message, a search or a document has one meaning.

use crate::tools;
use anyhow::{Context as _, Result, bail};
use std::{collections::BTreeMap, fs};
use syn::visit::{self, Visit};

/// What several modules of a package may have.
const SHARED: [&str; 3] = ["Config", "Error", "Stats"];
/// Folders of packages; the longest that a path starts with counts.
const PACKAGES: [&str; 10] = [
    "sampler/core",
    "sampler/labels",
    "sampler/session",
    "sampler/report",
    "sampler/src",
    "sampler-common",
    "xtask",
    "tests/nvml-sim",
    "tests",
    "benches",
];

pub fn check() -> Result<()> {
    tools::progress("no type name twice in a package");
    let mut places: BTreeMap<(&str, String), Vec<String>> = BTreeMap::new();
    for name in tools::tracked()?.into_iter().filter(|name| name.ends_with(".rs")) {
        let package =
            PACKAGES.into_iter().filter(|folder| name.starts_with(&format!("{folder}/"))).max_by_key(|folder| folder.len());
        let (Some(package), Ok(text)) = (package, fs::read_to_string(tools::root().join(&name))) else { continue };
        for defined in types(&text).with_context(|| name.clone())? {
            places.entry((package, defined)).or_default().push(name.clone());
        }
    }
    let twice: Vec<String> = places
        .iter()
        .filter(|((_, name), files)| files.len() > 1 && !SHARED.contains(&name.as_str()))
        .map(|((package, name), files)| format!("{package}: `{name}` is defined in {}", files.join(" and ")))
        .collect();
    if twice.is_empty() {
        return Ok(());
    }
    bail!("{}", twice.join("\n"));
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
}
