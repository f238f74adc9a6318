//! Processes with every behaviour that identity tracking has to handle. Each verb is one behaviour; its processes end with it.
//!
//! ```text
//! actor in CGROUP -- CMD ..          CMD started inside the cgroup (CLONE_INTO_CGROUP); prints its pid
//! actor thread-exec SECONDS          a thread that is not the leader execs `sleep SECONDS`; same pid
//! actor vfork SECONDS                vfork and exec of `sleep SECONDS`; prints its pid
//! actor zombie SECONDS               a child that lives SECONDS and is never reaped; prints its pid
//! actor leaderless SECONDS           the first thread ends, another one runs for SECONDS
//! actor storm LIVES EVERY CGROUP ..  forks as fast as possible; every EVERY-th child stays, in one of the cgroups; prints their pids
//! actor netns -- CMD ..              CMD in a new network namespace, of which loopback is up; same pid
//! actor serve FLAG PORT FILE         a web server on loopback that does what FILE says at each request; FLAG is ignored
//! ```

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};
use std::time::Duration;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks a child that starts in a cgroup v2 directory; returns 0 in the child.
fn fork_into(cgroup: &File) -> io::Result<i32> {
    // SAFETY: all zeroes is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = CLONE_INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: like fork: no shared memory, no stack given, and this program has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as i32) }
}

fn die_with_parent() {
    // SAFETY: takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

fn print(line: impl std::fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn wait_forever() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn sleep(seconds: &str) -> Command {
    let mut command = Command::new("sleep");
    command.arg(seconds);
    command
}

fn inside(cgroup: &str, command: &[String]) -> io::Result<()> {
    let cgroup = File::open(cgroup)?;
    let pid = fork_into(&cgroup)?;
    if pid == 0 {
        die_with_parent();
        let (program, arguments) = command.split_first().expect("a command follows --");
        let error = Command::new(program).args(arguments).exec();
        eprintln!("actor: {program}: {error}");
        std::process::exit(127);
    }
    print(pid)?;
    let mut status = 0;
    // SAFETY: our own child, a valid place for its status.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    Ok(())
}

fn thread_exec(seconds: String) -> io::Result<()> {
    let error = std::thread::spawn(move || sleep(&seconds).exec()).join();
    Err(error.unwrap_or_else(|_| io::Error::other("the thread panicked")))
}

fn vfork(seconds: &str) -> io::Result<()> {
    // std uses posix_spawn, which is a vfork, where nothing has to be done between fork and exec.
    let mut child = sleep(seconds).spawn()?;
    print(child.id())?;
    child.wait().map(|_| ())
}

fn zombie(seconds: &str) -> io::Result<()> {
    let child = sleep(seconds).spawn()?;
    print(child.id())?;
    wait_forever()
}

fn leaderless(seconds: &str) -> io::Result<()> {
    let seconds = seconds.parse().map_err(io::Error::other)?;
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        std::process::exit(0);
    });
    // SAFETY: ends this thread alone, without unwinding; nothing of it is used by the other.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    wait_forever()
}

fn storm(lives: u32, every: u32, cgroups: &[String]) -> io::Result<()> {
    let cgroups = cgroups.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    // SAFETY: ignoring SIGCHLD makes the kernel reap.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let mut stayed = Vec::new();
    for n in 0..lives {
        let stays = n % every == 0;
        let pid = if stays {
            fork_into(&cgroups[(n / every) as usize % cgroups.len()])?
        } else {
            // SAFETY: this program has one thread.
            unsafe { libc::fork() }
        };
        match pid {
            0 if stays => {
                die_with_parent();
                wait_forever()
            }
            // SAFETY: ends the child at once, nothing of the parent's is flushed twice.
            0 => unsafe { libc::_exit(0) },
            pid if pid < 0 => {
                // The process limit: ended children are reaped in a moment.
                std::thread::sleep(Duration::from_millis(1));
            }
            pid if stays => stayed.push(pid.to_string()),
            _ => {}
        }
    }
    print(stayed.join(" "))?;
    wait_forever()
}

/// Brings up the loopback interface of this network namespace.
fn raise_loopback() -> io::Result<()> {
    // SAFETY: takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: our own socket, and a request that lives until the call returns.
    let result = unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &raw mut request) };
    let error = io::Error::last_os_error();
    // SAFETY: our own socket, not used afterwards.
    unsafe { libc::close(socket) };
    if result < 0 { Err(error) } else { Ok(()) }
}

fn in_network_namespace(command: &[String]) -> io::Result<()> {
    // SAFETY: takes no pointers; this program has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    raise_loopback()?;
    let (program, arguments) = command.split_first().expect("a command follows --");
    Err(Command::new(program).args(arguments).exec())
}

fn serve(port: &str, file: &str) -> io::Result<()> {
    let port = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    for stream in listener.incoming() {
        let file = file.to_owned();
        // A client may go away at any time.
        std::thread::spawn(move || stream.and_then(|stream| respond(&stream, &file)));
    }
    Ok(())
}

/// The first line of the file: `page` (the other lines are its content), `error`, `redirect`, `huge`, `garbage`, `hang`.
fn respond(mut stream: &TcpStream, file: &str) -> io::Result<()> {
    let mut head = BufReader::new(stream).lines();
    while head.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let text = std::fs::read_to_string(file)?;
    let (behaviour, page) = text.split_once('\n').unwrap_or((&text, ""));
    let mut start = |status: &str, bytes: usize| write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {bytes}\r\n\r\n");
    match behaviour {
        "page" => {
            start("200 OK", page.len())?;
            stream.write_all(page.as_bytes())
        }
        "error" => start("500 Internal Server Error", 0),
        "redirect" => write!(stream, "HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/metrics\r\nContent-Length: 0\r\n\r\n"),
        "huge" => {
            write!(stream, "HTTP/1.1 200 OK\r\n\r\n")?;
            let line = "vllm:num_requests_waiting 1\n".repeat(4096);
            (0..(4_usize << 30) / line.len()).try_for_each(|_| stream.write_all(line.as_bytes()))
        }
        "garbage" => {
            start("200 OK", 12)?;
            stream.write_all(b"\xff\xfe{}\0<html>\n")
        }
        // Until the client closes.
        _ => head.next().transpose().map(|_| ()),
    }
}

fn main() -> ExitCode {
    die_with_parent();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["in", cgroup, "--", _, ..] => inside(cgroup, &args[3..]),
        ["netns", "--", _, ..] => in_network_namespace(&args[2..]),
        ["serve", _, port, file] => serve(port, file),
        ["thread-exec", seconds] => thread_exec(seconds.to_owned()),
        ["vfork", seconds] => vfork(seconds),
        ["zombie", seconds] => zombie(seconds),
        ["leaderless", seconds] => leaderless(seconds),
        ["storm", lives, every, _, ..] => {
            let number = |word: &str| word.parse().map_err(io::Error::other);
            number(lives).and_then(|lives| storm(lives, number(every)?, &args[3..]))
        }
        _ => Err(io::Error::other(format!("unknown verb {args:?}; actor.rs lists them"))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("actor {args:?}: {error}");
            ExitCode::FAILURE
        }
    }
}
