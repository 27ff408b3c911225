//! What a process gives up before it reads a stranger's bytes.
//!
//! Steps: limits of memory, files and processes; every descriptor but the three standard ones is
//! closed; where the system lets it, the process leaves the network and the mounts; it can gain no
//! privileges any more; and a filter of system calls is put in place. From then on the process can
//! read and write what is open, ask for memory and the time, and end. Anything else kills it.

use std::collections::BTreeMap;
use std::fs;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// `PROT_EXEC` of `mmap` and `mprotect`: the same on every architecture of Linux.
const PROT_EXEC: u64 = 4;

/// Why a process cannot give its rights up; it must then not read anything.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// A limit.
    #[error("a limit cannot be set")]
    Limit(#[source] nix::errno::Errno),
    /// The list of open descriptors.
    #[error("open files cannot be listed")]
    Descriptors(#[source] std::io::Error),
    /// Privileges.
    #[error("privileges cannot be given up")]
    Privileges(#[source] nix::errno::Errno),
    /// A machine whose system calls have other numbers.
    #[error("system calls of this machine are not known")]
    Machine,
    /// The filter.
    #[error("the filter of system calls cannot be put in place")]
    Filter(#[source] seccompiler::Error),
}

/// Gives up everything that a parser does not need.
///
/// - `memory_bytes`: address space.
///
/// # Errors
/// [`SandboxError`] where any of it fails, leaving the network and the mounts aside, which not every
/// system allows.
pub(crate) fn enter(memory_bytes: u64) -> Result<(), SandboxError> {
    // While it may still: limits below would forbid it.
    leave_network();
    let limits = [
        (Resource::RLIMIT_AS, memory_bytes),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_CORE, 0),
    ];
    for (resource, limit) in limits {
        setrlimit(resource, limit, limit).map_err(SandboxError::Limit)?;
    }
    close_descriptors()?;
    setrlimit(Resource::RLIMIT_NOFILE, 3, 3).map_err(SandboxError::Limit)?;
    nix::sys::prctl::set_no_new_privs().map_err(SandboxError::Privileges)?;
    filter()
}

/// Namespaces of its own, where users may have them: the filter alone must do elsewhere.
fn leave_network() {
    let own = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC;
    if unshare(own).is_err() {
        // Not allowed here.
    }
}

/// Closes what was left open by whoever started this process.
fn close_descriptors() -> Result<(), SandboxError> {
    let open: Vec<i32> = fs::read_dir("/proc/self/fd")
        .map_err(SandboxError::Descriptors)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        // The listing's own is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

/// The system calls that stay, by name of what they are for.
fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>, SandboxError> {
    use nix::libc;
    // Never memory that can be run.
    let not_executable = || -> Result<Vec<SeccompRule>, SandboxError> {
        let condition = SeccompCondition::new(
            2,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(PROT_EXEC),
            0,
        );
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        let rule = rule.map_err(|error| SandboxError::Filter(error.into()))?;
        Ok(vec![rule])
    };
    let plain = [
        // What is open.
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_close,
        // Memory.
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        // Time and waiting.
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_getrandom,
        // Signals, and what ends a thread or the process.
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        plain.into_iter().map(|call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, not_executable()?);
    rules.insert(libc::SYS_mprotect, not_executable()?);
    Ok(rules)
}

/// Puts the filter in place, for every thread of the process.
fn filter() -> Result<(), SandboxError> {
    let machine: TargetArch = std::env::consts::ARCH
        .try_into()
        .map_err(|_| SandboxError::Machine)?;
    let filter = SeccompFilter::new(
        allowed()?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        machine,
    );
    let program: BpfProgram = filter
        .and_then(TryInto::try_into)
        .map_err(|error| SandboxError::Filter(error.into()))?;
    seccompiler::apply_filter_all_threads(&program).map_err(SandboxError::Filter)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::net::{TcpListener, UdpSocket};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};
    use std::time::Instant;

    use super::*;

    const PROBE: &str = "AFTERIMAGE_SANDBOX_PROBE";
    const SURVIVED: &str = "the probe survived";
    const SIGSYS: i32 = 31;

    /// What this process does once it is a child of a test below, and nothing otherwise.
    #[test]
    fn child() {
        let Ok(probe) = std::env::var(PROBE) else {
            return;
        };
        enter(1 << 30).unwrap();
        match probe.as_str() {
            "work" => {
                // Memory comes and goes, the clock runs, what is open is written to.
                let started = Instant::now();
                let mut blocks = Vec::new();
                for len in 1..64_usize {
                    blocks.push(vec![1_u8; len << 14]);
                }
                drop(blocks);
                assert!(started.elapsed().as_secs() < 60);
            }
            "open" => drop(File::open("/dev/null")),
            "create" => drop(File::create("/tmp/afterimage-sandbox-probe")),
            "listen" => drop(TcpListener::bind("127.0.0.1:0")),
            "send" => drop(UdpSocket::bind("127.0.0.1:0")),
            "unix" => drop(std::os::unix::net::UnixStream::pair()),
            "run" => drop(Command::new("/bin/true").status()),
            "list" => drop(fs::read_dir("/")),
            "thread" => drop(std::thread::Builder::new().spawn(|| {})),
            other => panic!("no probe {other}"),
        }
        let mut out = std::io::stdout();
        writeln!(out, "{SURVIVED}").unwrap();
        out.flush().unwrap();
        std::process::exit(0);
    }

    fn probe(name: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::child", "--nocapture"])
            // As the parser is started.
            .env("MALLOC_ARENA_MAX", "1")
            .env(PROBE, name)
            .output()
            .unwrap()
    }

    #[test]
    fn what_a_parser_does_is_allowed() {
        let output = probe("work");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        assert!(said.contains(SURVIVED), "{said}");
    }

    #[test]
    fn files_sockets_programs_and_threads_kill_the_process() {
        for name in [
            "open", "create", "listen", "send", "unix", "run", "list", "thread",
        ] {
            let output = probe(name);
            assert_eq!(output.status.signal(), Some(SIGSYS), "{name}: {output:?}");
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(!said.contains(SURVIVED), "{name}: {said}");
        }
    }
}
