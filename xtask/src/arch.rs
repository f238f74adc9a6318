//! The processor architecture that is built for: this machine's, or another by cross-compilation with Debian's compilers. The programs of
//! another are run under user-mode emulation.

use crate::{setup, tools};
use anyhow::{Context as _, Result};
use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    X86_64,
    Aarch64,
}

impl Arch {
    const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    pub fn host() -> Result<Self> {
        let host = env::consts::ARCH;
        Self::named(host).with_context(|| format!("this machine is {host}; the agent is for {}", Self::names()))
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|arch| arch.name() == name)
    }

    fn names() -> String {
        Self::ALL.map(Self::name).join(" and ")
    }

    /// The one that `--target NAME` names, this machine's without it. What cross-compilation needs is installed.
    pub fn of_arguments(args: &[String]) -> Result<Self> {
        let arch = match args {
            [] => return Self::host(),
            [option, name] if option == "--target" => {
                Self::named(name).ok_or_else(|| tools::Usage(format!("--target {name}: it is one of {}", Self::names())))?
            }
            [option] if option == "--target" => {
                return Err(tools::Usage(format!("--target needs one of {}", Self::names())).into());
            }
            [word, ..] => return Err(tools::unknown(word)),
        };
        setup::ensure(setup::Scope::Cross(arch), false)?;
        Ok(arch)
    }

    /// As rustc and uname name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian names it in packages.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    pub fn triple(self) -> String {
        format!("{}-unknown-linux-gnu", self.name())
    }

    pub fn is_host(self) -> bool {
        self.name() == env::consts::ARCH
    }

    pub fn compiler(self) -> String {
        format!("{}-linux-gnu-gcc", self.name())
    }

    pub fn emulator(self) -> String {
        format!("qemu-{}-static", self.name())
    }

    /// The kernel program's object. It depends on the architecture's layout of saved registers. The path is fixed, independent of
    /// `CARGO_TARGET_DIR`: the agent's build script knows that of the host.
    pub fn ebpf_object(self) -> PathBuf {
        self.folder("ebpf-object").join("sampler-ebpf.o")
    }

    /// A folder of that name in `target`, one for each architecture.
    pub fn folder(self, name: &str) -> PathBuf {
        let name = if self.is_host() { name.to_owned() } else { format!("{name}-{}", self.name()) };
        tools::root().join("target").join(name)
    }

    /// Makes a call of cargo one for this architecture.
    pub fn select(self, cargo: &mut Command) {
        if !self.is_host() {
            let variable = format!("CARGO_TARGET_{}_LINKER", self.triple().to_uppercase().replace('-', "_"));
            cargo.args(["--target", &self.triple()]).env(variable, self.compiler());
        }
    }

    /// Where cargo puts what it builds for it.
    pub fn target_dir(self) -> Result<PathBuf> {
        let dir = tools::target_dir()?;
        Ok(if self.is_host() { dir } else { dir.join(self.triple()) })
    }

    /// Runs a program of this architecture.
    pub fn command(self, program: &Path) -> Command {
        if self.is_host() {
            return Command::new(program);
        }
        let mut command = Command::new(self.emulator());
        command.arg("-L").arg(format!("/usr/{}-linux-gnu", self.name())).arg(program);
        command
    }
}
