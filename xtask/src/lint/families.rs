//! Metric families: a name in the export code must be in the metric catalogue, so that it has a type, a help text and a line in
//! docs/metrics.md.

use crate::tools;
use anyhow::{Context as _, Result, bail};
use std::{collections::BTreeSet, fs, path::Path};

const EXPORT: &str = "sampler/src/export";
/// Within the export code.
const CATALOGUE: &str = "catalogue";
const PREFIXES: [&str; 3] = ["gpu_", "container_gpu_", "container_accelerator_"];
/// Series of a histogram are named after the family.
const HISTOGRAM_SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];

pub fn check() -> Result<()> {
    tools::progress("metric families are in the catalogue");
    let folder = tools::root().join(EXPORT);
    let mut catalogue = String::new();
    for (_, text) in sources(&folder.join(CATALOGUE))? {
        catalogue.push_str(&text);
    }
    let mut found = 0;
    for (name, text) in sources(&folder)? {
        for (line, family) in unlisted(&text, &catalogue) {
            eprintln!("{EXPORT}/{name}:{line}: {family} is not in {EXPORT}/{CATALOGUE}");
            found += 1;
        }
    }
    match found {
        0 => Ok(()),
        _ => bail!("{found} metric families without an entry in {EXPORT}/{CATALOGUE}"),
    }
}

/// Name and text of the Rust files directly in the folder.
fn sources(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            sources.push((name, fs::read_to_string(&path).with_context(|| path.display().to_string())?));
        }
    }
    Ok(sources)
}

/// Names of families in the text, with their lines, that the catalogue has neither as a family nor as a label.
fn unlisted<'a>(text: &'a str, catalogue: &str) -> Vec<(usize, &'a str)> {
    let listed: BTreeSet<&str> = catalogue.lines().flat_map(names).collect();
    let is_listed = |name: &str| {
        let families = HISTOGRAM_SUFFIXES.iter().filter_map(|suffix| name.strip_suffix(suffix));
        families.chain([name]).any(|family| listed.contains(family))
    };
    let lines = text.lines().enumerate();
    lines.flat_map(|(n, line)| names(line).map(move |name| (n + 1, name))).filter(|(_, name)| !is_listed(name)).collect()
}

/// String literals that look like the name of a family.
fn names(line: &str) -> impl Iterator<Item = &str> {
    let is_name = |text: &&str| {
        PREFIXES.iter().any(|prefix| text.len() > prefix.len() && text.starts_with(prefix))
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    line.split('"').skip(1).filter(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CATALOGUE_TEXT: &str = r#"
        INFO: Family::gauge(
            "gpu_info", "none", &["uuid", "gpu_uuid"])
            .help("See gpu_planted_total.");
        TIMES: Family::histogram("gpu_sampler_times_seconds", "seconds", &[]);
    "#;

    #[test]
    fn a_planted_family_without_an_entry_in_the_catalogue_is_found() {
        let planted = "fn f() {\n    to.family(Family::counter(\"gpu_planted_total\", \"seconds\", &[\"uuid\"]));\n}\n";
        assert_eq!(unlisted(planted, CATALOGUE_TEXT), [(2, "gpu_planted_total")]);
        for name in ["container_gpu_planted", "container_accelerator_planted", "gpu_sampler_planted_total", "gpu_info_planted"] {
            assert_eq!(unlisted(&format!("x(\"{name}\")"), CATALOGUE_TEXT), [(1, name)]);
        }
    }

    #[test]
    fn families_and_labels_of_the_catalogue_and_other_strings_are_accepted() {
        for text in
            ["\"gpu_info\"", "\"gpu_uuid\"", "\"gpu_sampler_times_seconds_bucket\"", "\"gpu-0\"", "\"gpu_\"", "gpu_other(\"x\")"]
        {
            assert_eq!(unlisted(text, CATALOGUE_TEXT), [], "{text}");
        }
    }
}
