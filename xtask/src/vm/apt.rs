//! Debian packages of several suites, from the mirror in this machine's apt configuration, without changes to its own lists.

use crate::{
    debian, sys,
    tools::{self, progress},
};
use anyhow::{Context, Result, anyhow, bail};
use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Kernels from 5.10 on. Backports have newer kernels than the suite they are made for.
const SUITES: [&str; 5] = ["bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports"];
/// Package lists younger than this are not refreshed.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);
/// The flavour without hardware drivers; it is small and has all that a virtual machine needs.
const FLAVOUR: &str = "-cloud-amd64";
const IMAGE: &str = "linux-image-";

pub struct Apt {
    /// Sources, lists and packages.
    dir: PathBuf,
    config: PathBuf,
    /// Suites with lists that could not be refreshed just now.
    stale: Vec<&'static str>,
}

impl Apt {
    /// Configures apt for [`SUITES`] and refreshes its lists if they are old.
    pub fn prepare(vm: &Path) -> Result<Self> {
        let mirror = debian::mirror()?;
        let dir = vm.join("apt");
        for folder in ["state/lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(dir.join(folder)).with_context(|| dir.display().to_string())?;
        }
        let line = |suite: &str| mirror.source(suite);
        let sources: String = SUITES.into_iter().map(line).collect();
        fs::write(dir.join("sources.list"), &sources)?;
        let config = dir.join("apt.conf");
        let at = dir.display();
        let settings = format!(
            "Dir::State \"{at}/state\";\nDir::Cache \"{at}/cache\";\nDir::Etc::sourcelist \"{at}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\nAPT::Sandbox::User \"root\";\nAPT::Get::List-Cleanup \"false\";\n"
        );
        fs::write(&config, settings)?;
        let mut apt = Self { dir, config, stale: Vec::new() };
        let stamp = apt.dir.join("updated");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age > FRESH) || fs::read_to_string(&stamp).ok().as_ref() != Some(&sources) {
            for suite in SUITES {
                apt.update(suite, &line(suite))?;
            }
            if apt.stale.is_empty() {
                fs::write(&stamp, &sources)?;
            }
        }
        Ok(apt)
    }

    /// Refreshes one suite: a mirror that lacks one suite must not keep the others from being refreshed.
    fn update(&mut self, suite: &'static str, source: &str) -> Result<()> {
        let list = self.dir.join("suite.list");
        fs::write(&list, source).with_context(|| list.display().to_string())?;
        let mut command = self.command("apt-get");
        // Without this option apt-get only warns about an unreachable mirror.
        command.args(["--quiet", "-o", "APT::Update::Error-Mode=any", "-o"]);
        command.arg(format!("Dir::Etc::sourcelist={}", list.display())).arg("update");
        if let Err(problem) = tools::run(&mut command) {
            if let Some(signal) = sys::interrupted() {
                bail!("interrupted by signal {signal}");
            }
            progress(format_args!("vm: warning: the package lists of {suite} could not be refreshed: {problem:#}"));
            self.stale.push(suite);
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C").current_dir(self.dir.join("packages"));
        command
    }

    /// Names of packages with this prefix.
    fn names(&self, begin: &str) -> Result<Vec<String>> {
        let listed = self.command("apt-cache").args(["pkgnames", begin]).output().context("apt-cache")?;
        Ok(String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect())
    }

    /// The kernel release that `wanted` selects.
    pub fn kernel(&self, wanted: &str) -> Result<String> {
        let begin = if wanted == NEWEST { "" } else { wanted.strip_prefix(IMAGE).unwrap_or(wanted) };
        let names = self.names(&format!("{IMAGE}{begin}"))?;
        let releases = names.iter().filter_map(|name| name.strip_prefix(IMAGE));
        choose(wanted, releases).map(str::to_owned).ok_or_else(|| self.unknown(wanted))
    }

    fn unknown(&self, wanted: &str) -> anyhow::Error {
        if !self.stale.is_empty() {
            let stale = self.stale.join(", ");
            return anyhow!(
                "no cloud kernel '{wanted}' in the package lists, and the package lists of {stale} could not be refreshed"
            );
        }
        let suites = SUITES.join(", ");
        let problem = format!("Debian has no cloud kernel '{wanted}' in {suites}; available versions include 6.1 and 7.3");
        tools::Usage(problem).into()
    }

    /// Downloads these packages as far as they exist; at least one must.
    pub fn download(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        let mut available = Vec::new();
        for name in names {
            if self.names(name)?.contains(name) {
                available.push(name);
            }
        }
        let Some(first) = available.first() else { bail!("there is no package {}", names.join(", ")) };
        progress(format_args!("vm: packages {first} and {} more", available.len() - 1));
        let printed = self.command("apt-get").args(["download", "--print-uris"]).args(&available).output().context("apt-get")?;
        if !printed.status.success() {
            bail!("apt-get download {first}: {}", String::from_utf8_lossy(&printed.stderr).trim());
        }
        tools::run(self.command("apt-get").args(["--quiet", "download"]).args(&available))?;
        // 'URL' FILE SIZE HASH
        let text = String::from_utf8_lossy(&printed.stdout).into_owned();
        let files = text.lines().filter_map(|line| line.split(' ').nth(1)).map(|file| self.dir.join("packages").join(file));
        files.map(|file| if file.exists() { Ok(file) } else { bail!("apt-get did not download {}", file.display()) }).collect()
    }
}

/// Selects the newest kernel of all suites.
pub const NEWEST: &str = "newest";

/// The kernel release that `wanted` selects among `releases`: the named package's, or the newest, of a version or of all.
pub fn choose<'a>(wanted: &str, mut releases: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    match wanted.strip_prefix(IMAGE) {
        Some(named) => releases.find(|release| *release == named),
        None => newest(wanted, releases),
    }
}

/// The newest kernel release of a version.
fn newest<'a>(version: &str, releases: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let is_of_version = |release: &&str| {
        let rest = release.strip_prefix(version);
        let is_wanted = version == NEWEST || rest.is_some_and(|rest| rest.starts_with(['.', '-', '+']));
        is_wanted && release.ends_with(FLAVOUR)
    };
    releases.filter(is_of_version).max_by(|a, b| natural(a, b))
}

/// Compares names with numbers in them by value.
fn natural(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| {
        let mut parts: Vec<(u64, String)> = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let word = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let (before, after) = rest.split_at(word);
            let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
            parts.push((after[..end].parse().unwrap_or(0), before.to_owned()));
            rest = &after[end..];
        }
        parts
    };
    let (a, b) = (parts(a), parts(b));
    let first = a.iter().zip(&b).map(|(a, b)| a.1.cmp(&b.1).then(a.0.cmp(&b.0))).find(|order| order.is_ne());
    first.unwrap_or(a.len().cmp(&b.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_of_a_version_is_chosen() {
        let releases = [
            "6.1.0-9-cloud-amd64",
            "6.1.0-50-cloud-amd64",
            "6.1.0-51-amd64",
            "6.1.0-52-cloud-amd64-unsigned",
            "6.12.95+deb12-cloud-amd64",
            "6.12.107+deb13-cloud-amd64",
            "7.3.4+deb13-cloud-amd64",
        ];
        let check = |wanted, expect| assert_eq!(choose(wanted, releases.into_iter()), expect, "{wanted}");
        check("6.1", Some("6.1.0-50-cloud-amd64"));
        check("6.12", Some("6.12.107+deb13-cloud-amd64"));
        check("6.12.95", Some("6.12.95+deb12-cloud-amd64"));
        check("7.3", Some("7.3.4+deb13-cloud-amd64"));
        check("7", Some("7.3.4+deb13-cloud-amd64"));
        check("newest", Some("7.3.4+deb13-cloud-amd64"));
        check("5.10", None);
        check("linux-image-6.1.0-51-amd64", Some("6.1.0-51-amd64"));
        check("linux-image-6.1", None);
    }
}
