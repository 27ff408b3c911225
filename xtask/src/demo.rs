//! `cargo xtask demo`: the whole way on one machine, with the very programs a hospital uses.
//!
//! 1. Build the programs, fetch ONNX Runtime, write tiny checkpoints with random weights.
//! 2. Export them to a bundle, make a key, sign.
//! 3. Start the daemon, wait until it says that it is ready, print the page's address.
//! 4. Start the scanner simulator at a faster clock, wait for the last trial's picture.
//! 5. Stop the daemon and leave the pictures in `demo-out/pictures`.

use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::onnxruntime::{self, OnnxRuntimeError};
use crate::synth::{self, SynthError};
use crate::workspace::{self, CommandError};

/// Longest wait for the daemon to load its bundle.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Longest wait for the last picture after the last volume.
const PICTURES_WITHIN: Duration = Duration::from_secs(300);
/// Voxels of the simulated person.
const VOXELS: u64 = 500;

/// The demo's settings.
#[derive(clap::Args)]
pub(crate) struct Request {
    /// Trials of the simulated run.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=100))]
    trials: u32,
    /// Times faster than a real scanner.
    #[arg(long, default_value_t = 10.0)]
    speed: f64,
    /// Port of the page.
    #[arg(long, default_value_t = 8440)]
    port: u16,
    /// Sampler: `edge` takes 4 steps, `reference` 38 guided ones.
    #[arg(long, default_value = "edge", value_parser = ["edge", "reference"])]
    fidelity: String,
    /// Keep the page open after the run, until Ctrl-C.
    #[arg(long)]
    stay: bool,
}

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    OnnxRuntime(#[from] OnnxRuntimeError),
    #[error("the synthetic checkpoints cannot be written")]
    Synth(#[from] SynthError),
    #[error("cannot use {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("port {port} is in use; stop what uses it, or choose another with --port")]
    Port { port: u16, source: io::Error },
    #[error("the daemon {happened}; its log is {log}")]
    Daemon { happened: String, log: PathBuf },
    #[error("{found} of {expected} trials have pictures after {} s; the log is {log}", PICTURES_WITHIN.as_secs())]
    Pictures {
        expected: usize,
        found: usize,
        log: PathBuf,
    },
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> DemoError {
    let path = path.to_path_buf();
    move |source| DemoError::Io {
        path: path.clone(),
        source,
    }
}

/// A child that does not outlive the demo.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        // Gone already, most likely.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the demo.
pub(crate) fn run(request: &Request) -> Result<(), DemoError> {
    let began = Instant::now();
    let library = onnxruntime::ensure()?;
    println!("building the programs");
    workspace::run(workspace::cargo().args([
        "build", "--locked", "--quiet", "-p", "daemon", "-p", "export",
    ]))?;
    let built = Instant::now();
    println!(
        "built after {:.0} s",
        built.duration_since(began).as_secs_f64()
    );
    // Taken for a moment, so that a busy port is named before anything else is done.
    TcpListener::bind(("127.0.0.1", request.port)).map_err(|source| DemoError::Port {
        port: request.port,
        source,
    })?;

    let out = workspace::root().join("demo-out");
    if out.exists() {
        fs::remove_dir_all(&out).map_err(io_at(&out))?;
    }
    let incoming = out.join("incoming");
    fs::create_dir_all(&incoming).map_err(io_at(&incoming))?;
    let checkpoints = out.join("checkpoints");
    synth::write(&synth::Request::tiny(VOXELS, &checkpoints))?;

    let afterimage = workspace::built("afterimage");
    let export = workspace::built("afterimage-export");
    let site = out.join("site");
    let voxels = VOXELS.to_string();
    workspace::run(
        Command::new(&afterimage)
            .args(["simulate", "--prepare", "--voxels", &voxels])
            .args(["--trials", &request.trials.to_string()])
            .arg("--site")
            .arg(&site),
    )?;
    let bundle = out.join("bundle");
    let (secret, public) = (out.join("demo.key"), out.join("demo.pub"));
    workspace::run(
        Command::new(&export)
            .args(["bundle", "--precision", "fp32", "--folder"])
            .arg(&checkpoints)
            .arg("--out")
            .arg(&bundle),
    )?;
    workspace::run(
        Command::new(&export)
            .arg("keygen")
            .arg("--secret")
            .arg(&secret)
            .arg("--public")
            .arg(&public),
    )?;
    workspace::run(
        Command::new(&export)
            .arg("sign")
            .arg("--bundle")
            .arg(&bundle)
            .arg("--secret")
            .arg(&secret),
    )?;

    // Sockets have short names only, and a checkout may lie deep.
    let runtime = std::env::temp_dir().join(format!("afterimage-demo-{}", std::process::id()));
    fs::create_dir_all(&runtime).map_err(io_at(&runtime))?;
    let config = write_settings(&out, &runtime, &library, request)?;
    let outcome = scan(request, &afterimage, &config, &out, &runtime);
    let _ = fs::remove_dir_all(&runtime);
    let pictures = outcome?;
    println!(
        "{pictures} pictures in {} ({:.0} s after the build)",
        out.join("pictures").display(),
        built.elapsed().as_secs_f64()
    );
    println!("the weights are random: the pictures show that the box works, nothing else");
    Ok(())
}

fn write_settings(
    out: &Path,
    runtime: &Path,
    library: &Path,
    request: &Request,
) -> Result<PathBuf, DemoError> {
    let path = out.join("site.toml");
    let boards = workspace::root().join("boards");
    let text = format!(
        "# Written by `cargo xtask demo`.\n\
         [paths]\nstate = \"state\"\nruntime = {runtime:?}\nboards = {boards:?}\n\
         [session]\nlabel = \"Demo\"\nseed = 1\n\
         [scanner]\nfolder = \"incoming\"\n\
         [task]\nevents = \"site/events.tsv\"\n\
         [subject]\nid = \"subj01\"\nmask = \"site/mask.nii\"\n\
         [model]\nbundle = \"bundle\"\nkey = \"demo.pub\"\nfidelity = {:?}\nonnxruntime = {library:?}\n\
         [web]\nlisten = \"127.0.0.1:{}\"\n",
        request.fidelity, request.port
    );
    fs::write(&path, text).map_err(io_at(&path))?;
    Ok(path)
}

/// Runs the daemon and the simulator to the end of the run; returns how many pictures there are.
fn scan(
    request: &Request,
    afterimage: &Path,
    config: &Path,
    out: &Path,
    runtime: &Path,
) -> Result<usize, DemoError> {
    let log_path = out.join("daemon.log");
    let log = File::create(&log_path).map_err(io_at(&log_path))?;
    let notify_path = runtime.join("ready.sock");
    let notify = UnixDatagram::bind(&notify_path).map_err(io_at(&notify_path))?;
    let mut daemon = Guarded(
        Command::new(afterimage)
            .args(["run", "--config"])
            .arg(config)
            .env("NOTIFY_SOCKET", &notify_path)
            .stderr(log)
            .spawn()
            .map_err(io_at(afterimage))?,
    );
    wait_for_ready(&mut daemon.0, &notify, &log_path)?;
    println!("the page: http://127.0.0.1:{}/bedside", request.port);
    workspace::run(
        Command::new(afterimage)
            .args(["simulate", "--speed", &request.speed.to_string()])
            .args([
                "--voxels",
                &VOXELS.to_string(),
                "--trials",
                &request.trials.to_string(),
            ])
            .arg("--site")
            .arg(out.join("site"))
            .arg("--into")
            .arg(out.join("incoming")),
    )?;
    let trials = usize::try_from(request.trials).unwrap_or(usize::MAX);
    let folder = wait_for_pictures(&mut daemon.0, out, trials, &log_path)?;
    if request.stay {
        println!("the run is over; the page stays until Ctrl-C");
        let _ = daemon.0.wait();
    } else {
        stop(&mut daemon.0, &log_path)?;
    }
    collect(&folder, &out.join("pictures"))
}

fn wait_for_ready(daemon: &mut Child, notify: &UnixDatagram, log: &Path) -> Result<(), DemoError> {
    let failed = |happened: String| DemoError::Daemon {
        happened,
        log: log.into(),
    };
    let deadline = Instant::now() + READY_WITHIN;
    let mut message = [0_u8; 256];
    let _ = notify.set_read_timeout(Some(Duration::from_millis(200)));
    while Instant::now() < deadline {
        if let Ok(len) = notify.recv(&mut message)
            && message[..len]
                .split(|&byte| byte == b'\n')
                .any(|line| line == b"READY=1")
        {
            return Ok(());
        }
        if let Ok(Some(status)) = daemon.try_wait() {
            return Err(failed(format!("ended with {status}")));
        }
    }
    Err(failed(format!(
        "is not ready after {} s",
        READY_WITHIN.as_secs()
    )))
}

/// Waits until every trial's picture is on record; returns the record's folder of pictures.
fn wait_for_pictures(
    daemon: &mut Child,
    out: &Path,
    trials: usize,
    log: &Path,
) -> Result<PathBuf, DemoError> {
    let sessions = out.join("state/sessions");
    let deadline = Instant::now() + PICTURES_WITHIN;
    let mut found = 0;
    while Instant::now() < deadline {
        if let Ok(Some(status)) = daemon.try_wait() {
            let happened = format!("ended with {status}");
            return Err(DemoError::Daemon {
                happened,
                log: log.into(),
            });
        }
        for session in fs::read_dir(&sessions).into_iter().flatten().flatten() {
            let folder = session.path().join("pictures");
            // A trial's JSON is written last.
            found = files(&folder, "json").len();
            if found >= trials {
                return Ok(folder);
            }
        }
        thread::sleep(Duration::from_millis(200));
    }
    Err(DemoError::Pictures {
        expected: trials,
        found,
        log: log.into(),
    })
}

fn stop(daemon: &mut Child, log: &Path) -> Result<(), DemoError> {
    if let Ok(pid) = i32::try_from(daemon.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let status = daemon.wait().map_err(io_at(log))?;
    if status.success() {
        return Ok(());
    }
    Err(DemoError::Daemon {
        happened: format!("stopped with {status}"),
        log: log.into(),
    })
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|end| end == ending))
        .collect()
}

fn collect(from: &Path, into: &Path) -> Result<usize, DemoError> {
    fs::create_dir_all(into).map_err(io_at(into))?;
    let pictures = files(from, "png");
    for picture in &pictures {
        fs::copy(picture, into.join(picture.file_name().unwrap_or_default()))
            .map_err(io_at(picture))?;
    }
    Ok(pictures.len())
}
