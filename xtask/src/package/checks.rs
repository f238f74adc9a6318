//! What a package must have: exactly the files that are meant, the program that was built, scripts that a shell can parse.

use crate::{
    arch::Arch,
    tools::{self, on_path, run},
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Files of both packages, next to the manual pages.
const COMMON: [&str; 8] = [
    "/etc/gpu-sampler/config.toml",
    "/usr/bin/gpu-sampler",
    "/usr/lib/sysusers.d/gpu-sampler.conf",
    "/usr/share/bash-completion/completions/gpu-sampler",
    "/usr/share/doc/gpu-sampler/CHANGELOG.md.gz",
    "/usr/share/doc/gpu-sampler/prometheus/rules.yml",
    "/usr/share/doc/gpu-sampler/prometheus/scrape.yml",
    "/usr/share/fish/vendor_completions.d/gpu-sampler.fish",
];
const DEB: [&str; 3] = [
    "/usr/lib/systemd/system/gpu-sampler.service",
    "/usr/share/doc/gpu-sampler/copyright",
    "/usr/share/zsh/vendor-completions/_gpu-sampler",
];
const RPM: [&str; 5] = [
    "/usr/lib/systemd/system/gpu-sampler.service",
    "/usr/share/licenses/gpu-sampler/LICENSE-APACHE",
    "/usr/share/licenses/gpu-sampler/LICENSE-GPL-2.0",
    "/usr/share/licenses/gpu-sampler/LICENSE-MIT",
    "/usr/share/zsh/site-functions/_gpu-sampler",
];
const CONFIGURATION: &str = "/etc/gpu-sampler/config.toml";

/// Standard output of a command that has to succeed.
fn output(program: &str, args: &[&str], file: &Path) -> Result<Vec<u8>> {
    let output = tools::program(program)?.args(args).arg(file).env("LC_ALL", "C").output().with_context(|| program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {} {}: {}", args.join(" "), file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

fn lines(program: &str, args: &[&str], file: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(output(program, args, file)?).with_context(|| program.to_owned())?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// The output of `second`, which gets that of `first`.
fn piped(first: Vec<u8>, second: &mut Command) -> Result<Vec<u8>> {
    let mut child = second.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().with_context(|| tools::shown(second))?;
    let mut input = child.stdin.take().context("stdin is a pipe")?;
    let writer = std::thread::spawn(move || input.write_all(&first));
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "`{}` failed ({})", tools::shown(second), output.status);
    writer.join().ok().context("the thread that writes has panicked")??;
    Ok(output.stdout)
}

fn has_exactly(package: &Path, found: impl IntoIterator<Item = String>, own: &[&str], pages: &[String]) -> Result<()> {
    let expected: BTreeSet<String> = COMMON.iter().chain(own).map(|path| (*path).to_owned()).collect();
    let expected = &expected | &pages.iter().map(|page| format!("/usr/share/man/man1/{page}")).collect();
    let found: BTreeSet<String> = found.into_iter().collect();
    let (missing, unexpected) = (&expected - &found, &found - &expected);
    ensure!(
        missing.is_empty() && unexpected.is_empty(),
        "{}: missing {missing:?}, not expected {unexpected:?}",
        package.display()
    );
    Ok(())
}

/// A unit or script that a package has must be one that a shell can parse, with every placeholder replaced.
fn is_script(name: &str, text: &str) -> Result<()> {
    ensure!(!text.contains("#DEBHELPER#"), "{name}: #DEBHELPER# was not replaced");
    piped(text.as_bytes().to_vec(), Command::new("sh").arg("-n")).with_context(|| name.to_owned())?;
    Ok(())
}

pub fn deb(arch: Arch, deb: &Path, program: &Path, pages: &[String]) -> Result<()> {
    let tree = output("dpkg-deb", &["--fsys-tarfile"], deb)?;
    let listed = String::from_utf8(piped(tree.clone(), Command::new("tar").args(["-t", "-v", "--numeric-owner"]))?)?;
    let mut files = Vec::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [mode, owner, _size, _date, _time, path, ..] = words[..] else { bail!("{line}: not a line of tar") };
        ensure!(owner == "0/0", "{line}: not of root");
        ensure!(mode.as_bytes()[8] != b'w', "{line}: writable by every user");
        if !path.ends_with('/') {
            // Debian's own tools accept units in either place; the path is compared as on a system with merged /usr.
            let path = path.trim_start_matches('.');
            files.push(if path.starts_with("/lib/") { format!("/usr{path}") } else { path.to_owned() });
        }
    }
    has_exactly(deb, files, &DEB, pages)?;
    let packed = piped(tree, Command::new("tar").args(["-x", "-O", "./usr/bin/gpu-sampler"]))?;
    ensure!(packed == fs::read(program)?, "{}: another program than {}", deb.display(), program.display());

    let control = deb.with_extension("control");
    if control.exists() {
        fs::remove_dir_all(&control)?;
    }
    run(tools::program("dpkg-deb")?.arg("--control").arg(deb).arg(&control))?;
    let read = |name: &str| fs::read_to_string(control.join(name)).with_context(|| format!("{name} of {}", deb.display()));
    ensure!(read("conffiles")?.trim() == CONFIGURATION, "conffiles: {}", read("conffiles")?);
    let fields = read("control")?;
    let architecture = format!("Architecture: {}\n", arch.debian());
    // That of another architecture is qualified.
    let library = if arch.is_host() { "libc6 (>= ".to_owned() } else { format!("libc6:{} (>= ", arch.debian()) };
    for field in [&*architecture, "Package: gpu-sampler\n", "Section: admin\n", &*library, "systemd-sysusers", "Installed-Size: "]
    {
        ensure!(fields.contains(field), "control has no {field:?}: {fields}");
    }
    let scripts = ["postinst", "prerm", "postrm"];
    for name in scripts {
        is_script(name, &read(name)?)?;
    }
    let begin = read("postinst")?;
    let (user, start) = (begin.find("systemd-sysusers "), begin.find("deb-systemd-invoke "));
    ensure!(user.is_some() && user < start, "postinst starts the unit before its user exists: {begin}");
    ensure!(read("postrm")?.contains("rm -rf /var/lib/gpu-sampler"), "postrm keeps the state after a purge");
    fs::remove_dir_all(&control)?;
    // Not installed for this: it has more than a hundred dependencies.
    if on_path("lintian").is_some() {
        run(tools::program("lintian")?.args(["--fail-on", "error", "--no-tag-display-limit"]).arg(deb))?;
    }
    Ok(())
}

pub fn rpm(arch: Arch, rpm: &Path, pages: &[String]) -> Result<()> {
    has_exactly(rpm, lines("rpm", &["--query", "--package", "--list"], rpm)?, &RPM, pages)?;
    let configuration = lines("rpm", &["--query", "--package", "--configfiles"], rpm)?;
    ensure!(configuration == [CONFIGURATION], "configuration: {configuration:?}");
    let scripts = String::from_utf8(output("rpm", &["--query", "--package", "--scripts"], rpm)?)?;
    for part in ["systemd-sysusers", "preset gpu-sampler.service", "disable --now", "try-restart"] {
        ensure!(scripts.contains(part), "{}: no {part:?} in its scripts: {scripts}", rpm.display());
    }
    let parts = ["%{POSTIN}", "%{PREUN}", "%{POSTUN}"];
    for part in parts {
        let text = String::from_utf8(output("rpm", &["--query", "--package", "--queryformat", part], rpm)?)?;
        is_script(part, &text)?;
    }
    let made_for = lines("rpm", &["--query", "--package", "--queryformat", "%{ARCH}"], rpm)?;
    ensure!(made_for == [arch.name()], "{}: for {made_for:?}", rpm.display());
    let needs = lines("rpm", &["--query", "--package", "--requires"], rpm)?;
    for need in ["libc.so.6", "systemd"] {
        ensure!(needs.iter().any(|line| line.starts_with(need)), "{}: does not require {need}: {needs:?}", rpm.display());
    }
    // Not signed: only digests.
    output("rpm", &["--checksig", "--nosignature"], rpm)?;
    Ok(())
}

/// Pages must not have an error that man reports.
pub fn pages(pages: &[PathBuf]) -> Result<()> {
    ensure!(!pages.is_empty(), "no manual pages");
    for page in pages {
        let mut man = tools::program("man")?;
        man.args(["--warnings", "--encoding=utf8", "--local-file"]).arg(page).env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8");
        let output = man.stdin(Stdio::null()).output().context("man")?;
        let warnings = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && warnings.trim().is_empty(), "{}: {}", page.display(), warnings.trim());
        ensure!(output.stdout.len() > 200, "{} is nearly empty", page.display());
    }
    Ok(())
}
