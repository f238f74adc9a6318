//! Debian packages of several suites, from the mirror that this machine's apt uses, without touching its own lists.

use crate::tools::{self, output, say};
use anyhow::{Context, Result, bail};
use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Kernels from 5.10 on. The backports come with newer kernels than the suite they are made for.
const SUITES: [&str; 5] = ["bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Package lists younger than this are taken as they are.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);
/// The flavour without drivers of hardware; small, and with all that a virtual machine needs.
const FLAVOUR: &str = "-cloud-amd64";
const IMAGE: &str = "linux-image-";

pub struct Apt {
    /// Sources, lists and packages.
    dir: PathBuf,
    config: PathBuf,
    pub mirror: String,
}

impl Apt {
    /// Configures apt for [`SUITES`] and refreshes its lists when they are old.
    pub fn prepare(vm: &Path) -> Result<Self> {
        let mirror = mirror()?;
        let dir = vm.join("apt");
        for folder in ["state/lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(dir.join(folder)).with_context(|| dir.display().to_string())?;
        }
        let line = |suite: &str| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        let sources: String = SUITES.into_iter().map(line).collect();
        fs::write(dir.join("sources.list"), &sources)?;
        let config = dir.join("apt.conf");
        let at = dir.display();
        let settings = format!(
            "Dir::State \"{at}/state\";\nDir::Cache \"{at}/cache\";\nDir::Etc::sourcelist \"{at}/sources.list\";\n\
             Dir::Etc::sourceparts \"/dev/null\";\nAPT::Sandbox::User \"root\";\n"
        );
        fs::write(&config, settings)?;
        let apt = Self { dir, config, mirror };
        let stamp = apt.dir.join("updated");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age > FRESH) || fs::read_to_string(&stamp).ok().as_ref() != Some(&sources) {
            tools::run(apt.command("apt-get").args(["--quiet", "update"]))?;
            fs::write(&stamp, &sources)?;
        }
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C").current_dir(self.dir.join("packages"));
        command
    }

    /// Packages whose names begin so.
    fn names(&self, begin: &str) -> Result<Vec<String>> {
        let listed = self.command("apt-cache").args(["pkgnames", begin]).output().context("apt-cache")?;
        Ok(String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect())
    }

    /// The kernel release that `wanted` stands for: the newest of that version, or that package's.
    pub fn kernel(&self, wanted: &str) -> Result<String> {
        let names = self.names(&format!("{IMAGE}{}", wanted.strip_prefix(IMAGE).unwrap_or(wanted)))?;
        if let Some(release) = wanted.strip_prefix(IMAGE) {
            let found = names.iter().any(|name| name == wanted);
            return if found { Ok(release.to_owned()) } else { Err(unknown(wanted)) };
        }
        newest(wanted, names.iter().map(String::as_str)).map(str::to_owned).ok_or_else(|| unknown(wanted))
    }

    /// Downloads those of these packages that exist; at least one must.
    pub fn download(&self, names: &[String]) -> Result<Vec<PathBuf>> {
        let mut there = Vec::new();
        for name in names {
            if self.names(name)?.contains(name) {
                there.push(name);
            }
        }
        let Some(first) = there.first() else { bail!("there is no package {}", names.join(", ")) };
        say(format_args!("vm: packages {first} and {} more", there.len() - 1));
        let printed = self.command("apt-get").args(["download", "--print-uris"]).args(&there).output().context("apt-get")?;
        if !printed.status.success() {
            bail!("apt-get download {first}: {}", String::from_utf8_lossy(&printed.stderr).trim());
        }
        tools::run(self.command("apt-get").args(["--quiet", "download"]).args(&there))?;
        // 'URL' FILE SIZE HASH
        let text = String::from_utf8_lossy(&printed.stdout).into_owned();
        let files = text.lines().filter_map(|line| line.split(' ').nth(1)).map(|file| self.dir.join("packages").join(file));
        files.map(|file| if file.exists() { Ok(file) } else { bail!("apt-get did not leave {}", file.display()) }).collect()
    }
}

fn unknown(wanted: &str) -> anyhow::Error {
    let suites = SUITES.join(", ");
    tools::Usage(format!("Debian has no cloud kernel '{wanted}' in {suites}; `cargo xtask vm 6.1` and 7.3 are two that it has"))
        .into()
}

/// The mirror of Debian itself in this machine's own configuration.
fn mirror() -> Result<String> {
    let listed = output("apt-get", &["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"]);
    let listed = listed.context("`apt-get indextargets` failed; apt is needed, with a mirror of Debian configured")?;
    let own = listed.lines().find_map(|line| line.strip_prefix("Debian Debian "));
    let own =
        own.context("this machine's apt has no mirror of Debian; add one to /etc/apt/sources.list.d and run `apt-get update`")?;
    Ok(own.trim_end_matches('/').to_owned())
}

/// The newest kernel release of a version among package names.
fn newest<'a>(version: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let of_version = |name: &'a str| {
        let release = name.strip_prefix(IMAGE)?;
        let rest = release.strip_prefix(version)?;
        (rest.starts_with(['.', '-', '+']) && release.ends_with(FLAVOUR)).then_some(release)
    };
    names.filter_map(of_version).max_by(|a, b| natural(a, b))
}

/// Numbers within names count as numbers.
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
    fn the_newest_of_a_version_is_taken() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-6.1.0-51-amd64",
            "linux-image-6.1.0-52-cloud-amd64-unsigned",
            "linux-image-6.12.95+deb12-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-7.3.4+deb13-cloud-amd64",
        ];
        let check = |version, expect| assert_eq!(newest(version, names.into_iter()), expect, "{version}");
        check("6.1", Some("6.1.0-50-cloud-amd64"));
        check("6.12", Some("6.12.107+deb13-cloud-amd64"));
        check("6.12.95", Some("6.12.95+deb12-cloud-amd64"));
        check("7.3", Some("7.3.4+deb13-cloud-amd64"));
        check("7", Some("7.3.4+deb13-cloud-amd64"));
        check("5.10", None);
    }
}
