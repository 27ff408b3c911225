//! `afterimage run` at a site: its log, its processes, its pages and its end.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::program::command;
use crate::site::Site;

/// How long anything may take on a machine that does other things as well.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a stop may take.
pub const STOP_WITHIN: Duration = Duration::from_secs(10);
/// How long one page may take.
const PAGE_WITHIN: Duration = Duration::from_secs(10);
/// What the sentence about a pause of the scanner holds.
const STALL: &str = "no volume for";
const LOG_TAIL_LINES: usize = 60;

/// An answer of the pages.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// What came before the body.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A running `afterimage run`; whatever is left of it is killed when this is dropped.
#[derive(Debug)]
pub struct Daemon<'s> {
    site: &'s Site,
    child: Child,
    log: PathBuf,
    ended: Option<ExitStatus>,
    /// Every process that was seen below it.
    seen: BTreeSet<i32>,
}

impl<'s> Daemon<'s> {
    /// Starts the daemon and waits until its pages answer and every role is up.
    ///
    /// # Panics
    /// With the end of its log, where it does not come up.
    #[track_caller]
    pub fn start(site: &'s Site) -> Daemon<'s> {
        let mut daemon = Daemon::spawn(site);
        daemon.wait("the pages", |daemon| {
            daemon
                .try_get("/healthz")
                .filter(|answer| answer.status == 200)
        });
        daemon.wait_until_up();
        daemon
    }

    /// Starts the daemon.
    pub fn spawn(site: &'s Site) -> Daemon<'s> {
        let nth = fs::read_dir(site.dir())
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().extension().is_some_and(|end| end == "log"))
            .count();
        let log = site.dir().join(format!("daemon-{nth}.log"));
        let mut command = command("afterimage");
        command.args(["run", "--config"]).arg(site.config());
        let child = command
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Daemon {
            site,
            child,
            log,
            ended: None,
            seen: BTreeSet::new(),
        }
    }

    /// Waits until the show role hears from both others.
    #[track_caller]
    pub fn wait_until_up(&mut self) {
        self.wait("every role to be up", |daemon| {
            let roles = daemon.try_board()?["roles"].clone();
            let up = |role: &str| roles[role] == "up";
            (up("acquire") && up("decode") && up("show")).then_some(())
        });
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    /// Looks again and again until there is an answer.
    ///
    /// # Panics
    /// With the end of the log, where there is none within [`PATIENCE`] or the daemon ends.
    #[track_caller]
    pub fn wait<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            if let Some(status) = self.try_ended() {
                self.give_up(&format!("ended with {status} while waiting for {what}"));
            }
            if started.elapsed() > PATIENCE {
                self.give_up(&format!("waited {PATIENCE:?} for {what}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    #[track_caller]
    fn give_up(&self, why: &str) -> ! {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n");
        panic!("{why}; the daemon's log ends:\n{tail}");
    }

    /// Asserts, with the end of the log where it does not hold.
    ///
    /// # Panics
    /// Where it does not hold.
    #[track_caller]
    pub fn check(&self, holds: bool, what: &str) {
        if !holds {
            self.give_up(what);
        }
    }

    /// A page, where the pages answer.
    pub fn try_get(&self, path: &str) -> Option<Answer> {
        let mut stream = TcpStream::connect_timeout(&self.site.listen, PAGE_WITHIN).ok()?;
        stream.set_read_timeout(Some(PAGE_WITHIN)).ok()?;
        let listen = self.site.listen;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {listen}\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).ok()?;
        answer(&bytes)
    }

    /// A page.
    ///
    /// # Panics
    /// Where the pages do not answer.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        match self.try_get(path) {
            Some(answer) => answer,
            None => self.give_up(&format!("{path} does not answer")),
        }
    }

    /// The first bytes of the event stream, up to and with `until`.
    ///
    /// # Panics
    /// Where they do not come.
    #[track_caller]
    pub fn events(&self, until: &str) -> String {
        let mut stream = TcpStream::connect(self.site.listen).unwrap();
        stream.set_read_timeout(Some(PAGE_WITHIN)).unwrap();
        write!(
            stream,
            "GET /events HTTP/1.1\r\nHost: {}\r\n\r\n",
            self.site.listen
        )
        .unwrap();
        let mut text = String::new();
        let mut buffer = [0_u8; 4096];
        while !text.contains(until) {
            match stream.read(&mut buffer) {
                Ok(len @ 1..) => text.push_str(&String::from_utf8_lossy(&buffer[..len])),
                other => self.give_up(&format!(
                    "{other:?} on /events before {until:?}, after {text}"
                )),
            }
        }
        text
    }

    fn try_board(&self) -> Option<Value> {
        serde_json::from_slice(&self.try_get("/api/trials")?.body).ok()
    }

    /// `/api/trials`.
    ///
    /// # Panics
    /// Where it is not JSON.
    #[track_caller]
    pub fn board(&self) -> Value {
        serde_json::from_slice(&self.get("/api/trials").body).unwrap()
    }

    /// Trials of run 1 whose picture is on the board.
    pub fn pictured(&self) -> Vec<u64> {
        let board = self.try_board().unwrap_or_default();
        let trials = board["trials"].as_array().cloned().unwrap_or_default();
        trials
            .iter()
            .filter(|trial| trial["run"] == 1)
            .filter(|trial| {
                let kinds = trial["kinds"].as_array().unwrap();
                kinds.iter().any(|picture| picture["kind"] == "unrefined")
            })
            .map(|trial| trial["trial"].as_u64().unwrap())
            .collect()
    }

    /// Waits until trials 1 to `trials` of run 1 have their picture on the board.
    ///
    /// # Panics
    /// As [`Daemon::wait`] does.
    #[track_caller]
    pub fn wait_for_trials(&mut self, trials: u32) {
        let all: Vec<u64> = (1..=u64::from(trials)).collect();
        self.wait(&format!("pictures of {trials} trials"), |daemon| {
            (daemon.pictured() == all).then_some(())
        });
    }

    /// Trials of run 1 whose early picture is whole on record, with the file that says so.
    pub fn recorded(&self) -> Vec<(u32, PathBuf)> {
        self.recorded_as("fast")
    }

    /// Trials of run 1 whose picture of a decode time (`fast`, `slow`, `end`) is whole on record.
    pub fn recorded_as(&self, tier: &str) -> Vec<(u32, PathBuf)> {
        let pictures = self.site.session().join("pictures");
        let whole = (1..=999).map(|trial| {
            let note = format!("run001-trial{trial:03}-{tier}.json");
            (trial, pictures.join(note))
        });
        whole.filter(|(_, note)| note.is_file()).collect()
    }

    /// Waits until trials 1 to `trials` of run 1, and perhaps later ones, are whole on record; a
    /// picture is shown before.
    #[track_caller]
    pub fn wait_for_notes(&mut self, trials: u32) {
        self.wait(&format!("the record of {trials} trials"), |daemon| {
            let recorded: Vec<u32> = daemon.recorded().iter().map(|(trial, _)| *trial).collect();
            (1..=trials)
                .all(|trial| recorded.contains(&trial))
                .then_some(())
        });
    }

    /// The texts of the faults on the board, but for pauses of the scanner: a busy machine pauses by
    /// itself, and [`Daemon::stalls`] has them.
    #[track_caller]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = self.all_faults();
        faults.retain(|fault| !fault.contains(STALL));
        faults
    }

    /// The texts about pauses of the scanner.
    #[track_caller]
    pub fn stalls(&self) -> Vec<String> {
        let mut faults = self.all_faults();
        faults.retain(|fault| fault.contains(STALL));
        faults
    }

    #[track_caller]
    fn all_faults(&self) -> Vec<String> {
        let board = self.board();
        let faults = board["faults"].as_array().unwrap();
        faults
            .iter()
            .map(|fault| fault["text"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The daemon's own process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The process of a role, where it runs: `acquire`, `decode`, `show`, or the parser `parse`.
    pub fn role(&mut self, role: &str) -> Option<i32> {
        self.roles(role).into_iter().next()
    }

    /// Every process of a role: there are two parsers, one of them in reserve.
    pub fn roles(&mut self, role: &str) -> Vec<i32> {
        let mut below = descendants(self.pid());
        self.seen.extend(&below);
        below.retain(|&pid| {
            let words = arguments(pid);
            words.get(1).is_some_and(|word| word == "role")
                && words.get(2).is_some_and(|word| word == role)
        });
        below
    }

    /// Kills the process of a role as nobody expects it, and returns which one it was.
    #[track_caller]
    pub fn kill_role(&mut self, role: &str) -> i32 {
        let old = self.wait(&format!("{role} to run"), |daemon| daemon.role(role));
        kill(Pid::from_raw(old), Signal::SIGKILL).unwrap();
        old
    }

    /// Kills the daemon's own process as nobody expects it, and returns those that ran below it.
    ///
    /// # Panics
    /// Where it ended before.
    pub fn kill(&mut self) -> Vec<i32> {
        let below = descendants(self.pid());
        self.seen.extend(&below);
        self.child.kill().unwrap();
        self.ended = Some(self.child.wait().unwrap());
        below
    }

    /// Every process that was seen below the daemon and still is there.
    pub fn left(&self) -> Vec<i32> {
        self.seen
            .iter()
            .copied()
            .filter(|&pid| {
                let words = arguments(pid);
                words
                    .first()
                    .is_some_and(|word| word.ends_with("afterimage"))
                    && words.get(1).is_some_and(|word| word == "role")
            })
            .collect()
    }

    fn try_ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap();
        }
        self.ended
    }

    /// Waits for the daemon's end, asked for or not.
    ///
    /// # Panics
    /// Where it does not end in time; what is left of it is killed.
    #[track_caller]
    pub fn ended(&mut self, within: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.try_ended() {
                return status;
            }
            if started.elapsed() > within {
                self.give_up(&format!("the daemon did not end within {within:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the daemon to stop, and checks that it does, in time, with nothing left of it.
    #[track_caller]
    pub fn stop(&mut self) {
        self.seen.extend(descendants(self.pid()));
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).unwrap();
        let status = self.ended(STOP_WITHIN);
        self.check(
            status.code() == Some(0),
            &format!("SIGTERM ended the daemon with {status}, expected exit code 0"),
        );
        let left = self.left();
        self.check(left.is_empty(), &format!("processes {left:?} are left"));
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.seen.extend(descendants(self.pid()));
            // Already gone, most likely.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        for pid in self.left() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn answer(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let body = bytes[end + 4..].to_vec();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let chunked = head
        .to_ascii_lowercase()
        .contains("transfer-encoding: chunked");
    assert!(!chunked, "pages have a length: {head}");
    Some(Answer { status, head, body })
}

/// The words of a process's command line; none where it is gone.
fn arguments(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes
        .split(|&byte| byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

/// Every process below one, children before their own.
fn descendants(pid: i32) -> Vec<i32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(child) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // "pid (name) state parent ...", and the name may hold anything.
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1))
            .and_then(|parent| parent.parse::<i32>().ok());
        if let Some(parent) = parent {
            parents.push((child, parent));
        }
    }
    let mut below = vec![pid];
    let mut next = 0;
    while let Some(&parent) = below.get(next) {
        below.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(child, _)| *child),
        );
        next += 1;
    }
    below.remove(0);
    below
}
