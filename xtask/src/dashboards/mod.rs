//! The Grafana dashboards in `deploy/grafana`: `cargo xtask docs` writes the JSON from the panels here, and `cargo xtask lint` compares.
//!
//! A panel states title, unit, meaning and queries; layout, ids and the collectors that a scrape has to name follow from these.

mod agent;
pub mod catalogue;
mod contention;
mod fleet;
mod model;
mod node;
mod user;

use crate::tools;
use anyhow::{Context as _, Result, bail};
use catalogue::Catalogue;
use std::fs;

const FOLDER: &str = "deploy/grafana";

/// File names with their contents.
pub fn rendered() -> Result<Vec<(String, String)>> {
    let catalogue = Catalogue::read()?;
    let render = |dashboard: model::Dashboard| {
        let text = serde_json::to_string_pretty(&dashboard.json(&catalogue))?;
        Ok((format!("{FOLDER}/{}.json", dashboard.name), text + "\n"))
    };
    [fleet::dashboard(), node::dashboard(), user::dashboard(), contention::dashboard(), agent::dashboard()]
        .into_iter()
        .map(render)
        .collect()
}

pub fn write() -> Result<()> {
    for (file, text) in rendered()? {
        fs::write(tools::root().join(&file), text).context(file)?;
    }
    Ok(())
}

pub fn check() -> Result<()> {
    for (file, text) in rendered()? {
        let written = fs::read_to_string(tools::root().join(&file)).with_context(|| file.clone())?;
        if written != text {
            bail!("{file} is not what xtask/src/dashboards makes: run `cargo xtask docs`");
        }
    }
    Ok(())
}
