//! One run of a machine: its disks, qemu, its results.

use super::kernel::Kernel;
use crate::{
    sys,
    tools::{self, Running, progress, tail},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const QEMU: &str = "qemu-system-x86_64";
/// A kernel that boots with KVM prints its message within this time.
const PROBE: Duration = Duration::from_secs(20);
/// Size of the disk for $RESULTS. Sparse.
const RESULTS_BYTES: u64 = 1 << 30;
const CPUS: &str = "2";
/// File name in the folder of the run.
const INITRD: &str = "initrd";
/// The script that the machine's unit runs.
const GUEST: &str = include_str!("guest.sh");

pub struct Machine<'a> {
    pub kernel: Kernel,
    pub root: PathBuf,
    pub memory_mib: u32,
    pub append: &'a str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Accelerator {
    Kvm,
    Emulation,
}

impl Accelerator {
    fn args(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Emulation => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

impl Machine<'_> {
    /// Boots, runs the command with `files` on its PATH, and returns its exit status. Afterwards `results` has the contents of `$RESULTS`.
    pub fn run(&self, run: &Path, results: &Path, files: &[PathBuf], command: &[String], timeout: Duration) -> Result<u8> {
        let input = run.join("input.tar");
        pack(run, &input, files, command)?;
        let output = run.join("results.img");
        fs::File::create(&output).and_then(|file| file.set_len(RESULTS_BYTES)).with_context(|| output.display().to_string())?;
        fs::write(run.join(INITRD), self.kernel.initrd()?).with_context(|| run.join(INITRD).display().to_string())?;
        let accelerator = self.accelerator(run)?;
        let console = results.join("console.txt");
        let mut qemu = self.qemu(run, accelerator, &console, "quiet systemd.show_status=error systemd.crash_reboot");
        let disk = |file: &Path, more: &str| format!("file={},format=raw,if=virtio{more}", file.display());
        qemu.args(["-drive", &disk(&self.root, ",snapshot=on")]);
        qemu.args(["-drive", &disk(&input, ",readonly=on")]);
        qemu.args(["-drive", &disk(&output, "")]);
        qemu.args(["-drive", &disk(&self.kernel.modules(), ",readonly=on")]);
        let log = results.join("output.txt");
        qemu.args(["-chardev", &format!("stdio,id=out,signal=off,logfile={}", log.display()), "-serial", "chardev:out"]);
        progress(format_args!("vm: {}", tools::shown(&qemu)));
        let begun = Instant::now();
        let ended = wait(Running::start("the machine", &mut qemu)?, timeout)?;
        progress(format_args!("vm: ran {:.0} s", begun.elapsed().as_secs_f64()));
        let traces = || {
            // systemd queries the terminal on the console; the queries must not reach this terminal.
            let end: String = tail(&console).chars().filter(|c| *c == '\n' || !c.is_control()).collect();
            let (console, log) = (console.display(), log.display());
            format!("the console is in {console}, the command's output in {log}; the console ends with:\n{end}")
        };
        if !ended {
            bail!("the machine was still running after {timeout:?} (--timeout) and was stopped; {}", traces());
        }
        if let Err(problem) = unpack(&output, results) {
            bail!("cannot unpack the machine's results: {problem:#}; {}", traces());
        }
        let status = results.join("exit-status");
        // The results disk is all zeros until the command has ended, and that is an empty archive.
        let Ok(text) = fs::read_to_string(&status) else {
            bail!("the machine powered off before the command had ended; {}", traces());
        };
        text.trim().parse().with_context(|| format!("{}: {text:?}", status.display()))
    }

    /// The command line except for the disks and the second serial line.
    fn qemu(&self, run: &Path, accelerator: Accelerator, console: &Path, more: &str) -> Command {
        let mut qemu = Command::new(QEMU);
        // For its snapshots of disks.
        qemu.env("TMPDIR", run).stdin(Stdio::null());
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none", "-smp", CPUS]);
        qemu.args(accelerator.args()).args(["-m", &self.memory_mib.to_string()]);
        qemu.arg("-kernel").arg(self.kernel.vmlinuz()).arg("-initrd").arg(run.join(INITRD));
        qemu.args(["-append", format!("console=ttyS0 panic=-1 {more} {}", self.append).trim()]);
        qemu.args(["-serial", &format!("file:{}", console.display())]);
        qemu
    }

    /// KVM if it boots this kernel. Some machines offer /dev/kvm for special kernels only, so it is tried.
    fn accelerator(&self, run: &Path) -> Result<Accelerator> {
        if !Path::new("/dev/kvm").exists() {
            progress("vm: no /dev/kvm; emulating the processor");
            return Ok(Accelerator::Emulation);
        }
        let console = run.join("probe.txt");
        let mut qemu = self.qemu(run, Accelerator::Kvm, &console, "vm.probe");
        qemu.stdout(Stdio::null()).stderr(Stdio::null());
        let _ended = wait(Running::start("the probe of KVM", &mut qemu)?, PROBE)?;
        let text = fs::read(&console).unwrap_or_default();
        if String::from_utf8_lossy(&text).contains("vm: this accelerator boots this kernel") {
            return Ok(Accelerator::Kvm);
        }
        progress(format_args!("vm: KVM did not boot this kernel within {PROBE:?}; emulating the processor"));
        Ok(Accelerator::Emulation)
    }
}

/// Whether the machine ended by itself in time.
fn wait(mut machine: Running, timeout: Duration) -> Result<bool> {
    let begun = Instant::now();
    while machine.ended()?.is_none() {
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        if begun.elapsed() > timeout {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(true)
}

fn pack(run: &Path, input: &Path, files: &[PathBuf], command: &[String]) -> Result<()> {
    let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
    let (wrapper, script) = (run.join("guest.sh"), run.join("command"));
    fs::write(&script, format!("{}\n", words.join(" ")))?;
    fs::write(&wrapper, GUEST)?;
    let mut tar = Command::new("tar");
    tar.args(["--create", "--dereference", "--file"]).arg(input);
    for file in files.iter().chain([&wrapper, &script]) {
        let file = fs::canonicalize(file).with_context(|| file.display().to_string())?;
        let (folder, name) = (file.parent().context("a file is in a folder")?, file.file_name().context("a file has a name")?);
        tar.arg("--directory").arg(folder).arg(name);
    }
    tools::run(&mut tar)
}

fn unpack(image: &Path, results: &Path) -> Result<()> {
    tools::run(Command::new("tar").args(["--extract", "--no-same-owner", "--file"]).arg(image).arg("--directory").arg(results))
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_survive_a_shell() {
        for word in ["plain", "two words", "it's", "$HOME `x` \"y\"", ""] {
            let output = Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
