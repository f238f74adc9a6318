//! `vm`: runs a command in a virtual machine with a chosen kernel and with what this repository builds.
//!
//! Everything in the machine comes from Debian packages and is kept in `target/vm`: root file systems from debootstrap, kernels unpacked
//! from their packages. A run changes neither, leaves no process and no mount behind, and is bounded in time.
//!
//! ```text
//!   target/vm/apt                packages of several suites           (apt.rs)
//!            /root-SUITE-DIGEST.ext4    user space, with systemd      (image.rs)   vda, changes are discarded
//!            /kernel-RELEASE-DIGEST/    vmlinuz, modules.ext4         (kernel.rs)  vdd, mounted on /lib/modules
//!            /lock               held while one of these is built     (mod.rs)
//!            /run-PID/           initrd, input.tar, results.img       (boot.rs)    vdb, vdc
//!            /results/RELEASE-TIME/   contents of $RESULTS, output.txt, console.txt, journal.txt
//! ```

mod apt;
mod boot;
mod cpio;
mod image;
mod kernel;
pub mod matrix;

use crate::{
    build::{self, Built, Profile},
    janitor::{Cleanup, Leftover},
    setup, sys,
    tools::{self, Usage, progress},
};
use anyhow::{Context, Result, bail};
use apt::Apt;
use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const USAGE: &str = "usage: cargo xtask vm KERNEL [--append ARGS] [--suite SUITE] [--with FILE].. [--memory MIB] \
                     [--timeout 30m] [--debug] [--yes] -- COMMAND ..\n\
                     KERNEL is a version such as 7.3 or 6.1, newest, or the name of a linux-image package";

#[derive(Debug, PartialEq)]
struct VmOptions {
    kernel: String,
    append: String,
    suite: Option<String>,
    /// Further files for the machine.
    with: Vec<PathBuf>,
    memory_mib: u32,
    timeout: Duration,
    /// Build profile of the programs in the machine.
    profile: Profile,
    yes: bool,
    command: Vec<String>,
}

impl Default for VmOptions {
    fn default() -> Self {
        Self {
            kernel: String::new(),
            append: String::new(),
            suite: None,
            with: Vec::new(),
            memory_mib: 2560,
            timeout: Duration::from_secs(30 * 60),
            profile: Profile::Release,
            yes: false,
            command: Vec::new(),
        }
    }
}

fn usage(problem: impl std::fmt::Display) -> anyhow::Error {
    Usage(format!("{problem}\n{USAGE}")).into()
}

impl VmOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let end = args.iter().position(|word| word == "--");
        let (ours, command) = args.split_at(end.unwrap_or(args.len()));
        let mut options = Self { command: command.get(1..).unwrap_or_default().to_vec(), ..Self::default() };
        let mut words = ours.iter();
        while let Some(word) = words.next() {
            let (name, given) = tools::option(word);
            let mut value = || {
                let value = given.or_else(|| words.next().map(String::as_str));
                value.filter(|value| !value.is_empty()).ok_or_else(|| usage(format!("{name} needs a value")))
            };
            match name {
                "--append" => options.append = value()?.to_owned(),
                "--suite" => options.suite = Some(value()?.to_owned()),
                "--with" => options.with.push(value()?.into()),
                "--memory" => {
                    let number = value()?;
                    options.memory_mib = number.parse().map_err(|_| usage(format!("--memory {number} is not a number")))?;
                }
                "--timeout" => options.timeout = tools::duration(value()?)?,
                "--debug" => options.profile = Profile::Debug,
                "--yes" | "-y" => options.yes = true,
                _ if word.starts_with('-') => return Err(usage(format!("'{word}' is not an option of vm"))),
                _ if options.kernel.is_empty() => options.kernel.clone_from(word),
                _ => return Err(usage(format!("'{word}' is a second kernel; the command follows --"))),
            }
        }
        if options.kernel.is_empty() {
            return Err(usage("KERNEL is missing"));
        }
        if options.command.is_empty() {
            return Err(usage("COMMAND is missing"));
        }
        Ok(options)
    }
}

pub fn verb(args: &[String]) -> Result<()> {
    let options = VmOptions::parse(args)?;
    match run(&options)?.status {
        0 => Ok(()),
        status => Err(tools::Ended { what: options.command.join(" "), status }.into()),
    }
}

/// What a machine has left.
struct VmRun {
    release: String,
    results: PathBuf,
    /// Of the command.
    status: u8,
}

fn run(options: &VmOptions) -> Result<VmRun> {
    if env::consts::ARCH != "x86_64" {
        bail!("virtual machines are supported on x86_64 only, not on {}", env::consts::ARCH);
    }
    if !sys::is_root() {
        bail!("debootstrap requires root");
    }
    if let Some(file) = options.with.iter().find(|file| !file.is_file()) {
        bail!("--with {}: no such file", file.display());
    }
    setup::ensure(setup::Scope::Vm, options.yes)?;
    setup::ensure(setup::Scope::Ebpf, options.yes)?;
    let dir = tools::target_dir()?.join("vm");
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;

    sys::catch_signals();
    let mut cleanup = Cleanup::start()?;
    let (release, apt) = resolve(&dir, &options.kernel)?;
    let files = files(options)?;
    let suite = options.suite.as_deref().unwrap_or_else(|| image::suite_of(&release));
    let making = lock(&dir)?;
    let kernel = kernel::ensure(apt, &dir, &release, &mut cleanup)?;
    let root = image::ensure(&dir, suite, &mut cleanup)?;
    drop(making);

    let folder = dir.join(format!("run-{}", std::process::id()));
    cleanup.will_remove(&Leftover::Tree(folder.clone()))?;
    fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let results = dir.join("results").join(format!("{release}-{now}"));
    fs::create_dir_all(&results).with_context(|| results.display().to_string())?;
    let machine = boot::Machine { kernel, root, memory_mib: options.memory_mib, append: &options.append };
    let status = machine.run(&folder, &results, &files, &options.command, options.timeout);
    progress(format_args!("vm: results in {}", results.display()));
    Ok(VmRun { release, results, status: status? })
}

/// The kernel release that `wanted` selects. Package lists are needed only for a kernel that is not unpacked yet.
fn resolve(vm: &Path, wanted: &str) -> Result<(String, Option<Apt>)> {
    let _lock = lock(vm)?;
    // The newest of the suites need not be the newest that is unpacked.
    let cached = if wanted == apt::NEWEST { None } else { kernel::cached(vm, wanted)? };
    if let Some(release) = cached {
        progress(format_args!("vm: Linux {release}, cached in {}", vm.display()));
        return Ok((release, None));
    }
    let apt = Apt::prepare(vm)?;
    Ok((apt.kernel(wanted)?, Some(apt)))
}

/// Until the returned file is closed, no other run builds anything in `target/vm`: two concurrent first runs would build the same things.
fn lock(vm: &Path) -> Result<fs::File> {
    let path = vm.join("lock");
    let file = fs::File::create(&path).with_context(|| path.display().to_string())?;
    let mut waits = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(error)) => return Err(error).with_context(|| path.display().to_string()),
        }
        if !waits {
            progress(format_args!("vm: another run holds {}; waiting for it", path.display()));
            waits = true;
        }
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// Files on the PATH of the command: the programs and the files named on the command line.
fn files(options: &VmOptions) -> Result<Vec<PathBuf>> {
    let (built, helpers) = programs(options.profile)?;
    let mut files = vec![built.sampler, built.sim, built.sim_library, built.cuda_work, built.cuda_library];
    files.extend(helpers);
    files.extend(options.with.iter().cloned());
    match files.iter().find(|file| !file.is_file()) {
        Some(file) => bail!("{} is not a file", file.display()),
        None => Ok(files),
    }
}

/// Builds the agent, the simulator and the tests' helpers.
fn programs(profile: Profile) -> Result<(Built, Vec<PathBuf>)> {
    let names = ["actor", "storm-check"];
    match profile {
        Profile::Release => {
            let built = build::with_helpers(Profile::Release, &names)?;
            let helpers = names.map(|name| built.sampler.with_file_name(name)).to_vec();
            Ok((built, helpers))
        }
        // Those of the tests: after a run of these nothing is left to compile.
        Profile::Debug => {
            let helpers = names.iter().map(|name| build::debug_helper(name)).collect::<Result<_>>()?;
            Ok((build::everything(Profile::Debug)?, helpers))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<VmOptions> {
        VmOptions::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_command_line_is_parsed() {
        let options =
            parse("7.3 --append lockdown=integrity --with=a --with b --timeout 5m --debug -- storm-check --storms 1").unwrap();
        assert_eq!((options.profile, VmOptions::default().profile), (Profile::Debug, Profile::Release));
        assert_eq!(options.kernel, "7.3");
        assert_eq!(options.append, "lockdown=integrity");
        assert_eq!(options.with, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(options.timeout, Duration::from_secs(300));
        assert_eq!(options.command, ["storm-check", "--storms", "1"]);
    }

    #[test]
    fn invalid_arguments_are_usage_errors() {
        for line in
            ["", "7.3", "7.3 --", "-- true", "7.3 6.1 -- true", "7.3 --no -- true", "7.3 --memory x -- true", "7.3 --append"]
        {
            let problem = parse(line).unwrap_err();
            assert!(problem.downcast_ref::<Usage>().is_some(), "{line}: {problem:#}");
        }
    }
}
