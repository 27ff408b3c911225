#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

//! The real server, spoken to over a socket as a browser would.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use display::web::{Options, router, serve};
use display::{Board, Kind, RoleState, SessionInfo, Shown, png};
use serde_json::Value;

/// Longest wait for anything that should come at once.
const SOON: Duration = Duration::from_secs(10);

struct Server {
    address: SocketAddr,
    board: Board,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(options: Options) -> Self {
        let board = Board::new();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let (send_address, address) = mpsc::channel();
        let served = board.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                send_address.send(listener.local_addr().unwrap()).unwrap();
                let shutdown = async {
                    let _ = stopped.await;
                };
                serve(listener, served, options, shutdown).await.unwrap();
            });
        });
        Self {
            address: address.recv_timeout(SOON).unwrap(),
            board,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    /// Sends a request as it stands and reads the answer to its end.
    fn ask(&self, request: &str) -> Answer {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes)
    }

    fn get(&self, path: &str) -> Answer {
        self.ask(&request("GET", path, "localhost", ""))
    }

    fn follow(&self) -> Events {
        let mut stream = self.connect();
        stream
            .write_all(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut lines = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(lines.read_line(&mut head).unwrap(), 0, "{head}");
        }
        Events { head, lines }
    }

    fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }
}

fn request(method: &str, path: &str, host: &str, more: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n")
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap();
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        Self {
            status: status.parse().unwrap(),
            headers: lines
                .map(|line| line.split_once(": ").unwrap())
                .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                .collect(),
            body: bytes[end + 4..].to_vec(),
        }
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

struct Events {
    head: String,
    lines: BufReader<TcpStream>,
}

impl Events {
    /// The next event: its fields by name; chunk sizes and blank lines around it are skipped.
    fn next(&mut self) -> Option<BTreeMap<String, String>> {
        let mut fields = BTreeMap::new();
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            match line.trim_end_matches(['\r', '\n']).split_once(": ") {
                Some((name, value)) => {
                    fields.insert(name.to_owned(), value.to_owned());
                }
                None if line == "\n" && !fields.is_empty() => return Some(fields),
                None => {}
            }
        }
    }

    fn state(&mut self) -> Value {
        self.state_where(|_| true)
    }

    fn state_where(&mut self, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + SOON;
        while Instant::now() < deadline {
            let event = self.next().expect("the stream goes on");
            if event["event"] == "state" {
                let state = serde_json::from_str(&event["data"]).unwrap();
                if wanted(&state) {
                    return state;
                }
            }
        }
        panic!("no such state within {SOON:?}");
    }
}

fn shown(run: u32, trial: u32, kind: Kind) -> Shown {
    Shown {
        run,
        trial,
        kind,
        tier: "fast".to_owned(),
        width: 2,
        height: 1,
        png: png::encode(2, 1, &[1, 2, 3, 4, 5, 6], &[("Software", "test")]).unwrap(),
        stimulus_at_ms: Some(1_700_000_000_000),
        decoded_in_ms: 812,
        seed: u64::MAX.to_string(),
        steps: 4,
        fidelity: "edge".to_owned(),
    }
}

fn info(random_weights: bool) -> SessionInfo {
    SessionInfo {
        id: "1".into(),
        label: "session 3".to_owned(),
        random_weights,
        bundle: "edge 1.2".to_owned(),
    }
}

#[test]
fn root_leads_to_the_bedside() {
    let server = Server::start(Options::default());
    let answer = server.get("/");
    assert_eq!(
        (answer.status, &*answer.headers["location"]),
        (307, "/bedside")
    );
    let page = server.get("/bedside");
    assert_eq!(page.status, 200);
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    for needed in [
        "AI-generated reconstruction",
        "Random weights: these pictures show nothing that anyone saw",
        "Waiting for the first picture",
        "Connection lost, trying again",
        "aria-live=\"polite\"",
    ] {
        assert!(page.text().contains(needed), "{needed}");
    }
}

#[test]
fn page_asks_no_other_host_and_runs_nothing_inline() {
    let server = Server::start(Options::default());
    let page = server.get("/bedside");
    let mut files = Vec::new();
    for attribute in ["href=\"", "src=\""] {
        for part in page.text().split(attribute).skip(1) {
            files.push(part.split('"').next().unwrap());
        }
    }
    assert_eq!(files.len(), 3);
    for file in files {
        let answer = server.get(file);
        assert_eq!(answer.status, 200, "{file}");
        let text = answer.text().replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("://") && !text.contains("url("), "{file}");
    }
    assert!(!page.text().contains("://") && !page.text().contains("style="));
    assert!(
        page.text()
            .split("<script")
            .skip(1)
            .all(|script| script.contains("></script>"))
    );
}

#[test]
fn every_answer_carries_the_guarding_headers() {
    let server = Server::start(Options::default());
    server.board.picture(shown(1, 1, Kind::Blurry)).unwrap();
    for path in [
        "/",
        "/bedside",
        "/static/bedside.js",
        "/static/bedside.css",
        "/static/icon.svg",
        "/pictures/1/1/blurry",
        "/api/trials",
        "/healthz",
        "/nowhere",
    ] {
        let answer = server.get(path);
        let headers = &answer.headers;
        assert_eq!(
            headers["content-security-policy"],
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        assert_eq!(headers["x-content-type-options"], "nosniff", "{path}");
        assert_eq!(headers["referrer-policy"], "no-referrer", "{path}");
        assert_eq!(headers["cache-control"], "no-store", "{path}");
    }
    let head = server.follow().head.to_ascii_lowercase();
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    assert!(head.contains("content-security-policy: default-src 'none'"));
    assert_eq!(head.matches("cache-control").count(), 1);
}

#[test]
fn foreign_host_is_refused() {
    let server = Server::start(Options {
        hosts: vec!["box-7.local".to_owned()],
        ..Options::default()
    });
    for host in ["localhost:1", "127.0.0.1", "[::1]:8080", "BOX-7.local:80"] {
        let answer = server.ask(&request("GET", "/healthz", host, ""));
        assert_eq!(answer.status, 200, "{host}");
    }
    for host in ["evil.example", "10.0.0.1", "localhost.evil.example", ""] {
        let answer = server.ask(&request("GET", "/api/trials", host, ""));
        assert_eq!(answer.status, 421, "{host}");
        assert!(answer.headers.contains_key("content-security-policy"));
    }
    let twice = request("GET", "/healthz", "localhost", "Host: evil.example\r\n");
    assert!(matches!(server.ask(&twice).status, 400 | 421));
    let none = "GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert!(matches!(server.ask(none).status, 400 | 421));
    let absolute = request("GET", "http://evil.example/healthz", "localhost", "");
    assert_eq!(server.ask(&absolute).status, 421);
}

#[test]
fn only_reading_is_allowed() {
    let server = Server::start(Options::default());
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
        for path in ["/bedside", "/api/trials", "/events", "/nowhere"] {
            let answer = server.ask(&request(method, path, "localhost", ""));
            assert_eq!(answer.status, 405, "{method} {path}");
            assert_eq!(answer.headers["allow"], "GET, HEAD");
        }
    }
    let head = server.ask(&request("HEAD", "/bedside", "localhost", ""));
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_ne!(head.headers["content-length"], "0");
    let head = server.ask(&request("HEAD", "/events", "localhost", ""));
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(server.get("/healthz").json()["watchers"], 0);
}

#[test]
fn unknown_address_is_answered_in_words() {
    let server = Server::start(Options::default());
    server.board.picture(shown(1, 1, Kind::Blurry)).unwrap();
    for path in [
        "/nowhere",
        "/static/",
        "/static/../board.rs",
        "/static/%2e%2e%2fboard.rs",
        "/static/%ff",
        "/pictures/1/1/unrefined",
        "/pictures/1/2/blurry",
        "/pictures/1/1/stimulus",
        "/pictures/one/1/blurry",
        "/pictures/4294967296/1/blurry",
        "/pictures/-1/1/blurry",
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, 404, "{path}");
        assert!(answer.headers["content-type"].starts_with("text/plain"));
        assert!(answer.text().ends_with(".\n"), "{path}");
    }
}

#[test]
fn picture_comes_back_byte_for_byte_and_only_once_per_version() {
    let server = Server::start(Options::default());
    let sent = shown(1, 3, Kind::Unrefined);
    server.board.picture(sent.clone()).unwrap();
    let answer = server.get("/pictures/1/3/unrefined?v=anything");
    assert_eq!((answer.status, &answer.body), (200, &sent.png));
    assert_eq!(answer.headers["content-type"], "image/png");
    let tag = &answer.headers["etag"];
    let known = format!("If-None-Match: {tag}\r\n");
    let again = request("GET", "/pictures/1/3/unrefined", "localhost", &known);
    assert_eq!(server.ask(&again).status, 304);
    server.board.picture(sent).unwrap();
    assert_eq!(server.ask(&again).status, 200);
}

#[test]
fn newest_64_trials_are_listed_and_served() {
    let server = Server::start(Options::default());
    server.board.session(info(false));
    server.board.run_started(1, 1500.0);
    server.board.volume(1, 99);
    let roles = [("decode", RoleState::Down), ("acquire", RoleState::Up)];
    server
        .board
        .roles(roles.map(|(name, state)| (name.to_owned(), state)).into());
    server.board.fault("volume 12 is missing".to_owned());
    for trial in 1..=70 {
        server.board.picture(shown(1, trial, Kind::Blurry)).unwrap();
    }
    server.board.picture(shown(1, 70, Kind::Unrefined)).unwrap();

    let all = server.get("/api/trials").json();
    let trials = all["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 64);
    assert_eq!(
        (&trials[0]["trial"], &trials[63]["trial"]),
        (&7.into(), &70.into())
    );
    assert_eq!(server.get("/pictures/1/6/blurry").status, 404);
    assert_eq!(server.get("/pictures/1/7/blurry").status, 200);

    let newest = &trials[63];
    assert_eq!(newest["stimulus_at_ms"], 1_700_000_000_000_u64);
    let best = &newest["kinds"][1];
    assert_eq!(best["kind"], "unrefined");
    assert_eq!((&best["width"], &best["height"]), (&2.into(), &1.into()));
    assert_eq!(best["seed"], "18446744073709551615");
    assert_eq!(
        (&best["steps"], &best["decoded_in_ms"]),
        (&4.into(), &812.into())
    );
    assert_eq!(
        (&best["fidelity"], &best["tier"]),
        (&"edge".into(), &"fast".into())
    );
    assert!(best["shown_at_ms"].as_u64().unwrap() > 1_700_000_000_000);
    assert_eq!(server.get(best["url"].as_str().unwrap()).status, 200);

    assert_eq!(all["session"]["label"], "session 3");
    assert_eq!(all["session"]["bundle"], "edge 1.2");
    assert_eq!(
        (&all["progress"]["run"], &all["progress"]["volume"]),
        (&1.into(), &99.into())
    );
    assert_eq!(
        (&all["roles"]["decode"], &all["roles"]["acquire"]),
        (&"down".into(), &"up".into())
    );
    assert_eq!(all["faults"][0]["text"], "volume 12 is missing");
}

#[test]
fn health_is_ok() {
    let server = Server::start(Options::default());
    let answer = server.get("/healthz");
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.json()["status"], "ok");
    assert_eq!(answer.json()["watchers"], 0);
}

#[test]
fn state_comes_at_once_and_with_every_picture() {
    let server = Server::start(Options::default());
    let mut events = server.follow();
    let first = events.next().unwrap();
    assert_eq!((&*first["event"], &*first["retry"]), ("state", "2000"));
    let state: Value = serde_json::from_str(&first["data"]).unwrap();
    assert!(state["trial"].is_null() && state["label"].is_null() && state["run"].is_null());
    assert!(state["server_time_ms"].as_u64().unwrap() > 1_700_000_000_000);

    server.board.session(info(true));
    let state = events.state();
    assert_eq!(
        (&state["label"], &state["random_weights"]),
        (&"session 3".into(), &true.into())
    );

    server.board.run_started(4, 1500.0);
    assert_eq!(events.state()["run"], 4);
    server.board.picture(shown(4, 2, Kind::Blurry)).unwrap();
    let state = events.state();
    assert_eq!(
        (&state["trial"]["run"], &state["trial"]["trial"]),
        (&4.into(), &2.into())
    );
    assert_eq!(state["trial"]["kinds"].as_array().unwrap().len(), 1);

    server.board.picture(shown(4, 2, Kind::Unrefined)).unwrap();
    let kinds = &events.state()["trial"]["kinds"];
    assert_eq!(
        (&kinds[0]["kind"], &kinds[1]["kind"]),
        (&"blurry".into(), &"unrefined".into())
    );
    assert_eq!(server.get(kinds[1]["url"].as_str().unwrap()).status, 200);

    // A better estimate of an earlier trial does not take the bedside back to it.
    server.board.picture(shown(4, 1, Kind::Unrefined)).unwrap();
    assert_eq!(events.state()["trial"]["trial"], 2);
}

#[test]
fn caption_and_refined_picture_follow_the_picture_they_belong_to() {
    let server = Server::start(Options::default());
    server.board.session(info(false));
    let newest = || server.get("/api/trials").json()["trials"][0].clone();
    // Words without a picture have nothing to describe.
    server.board.caption(1, 1, "a boat".to_owned());
    server.board.picture(shown(1, 1, Kind::Unrefined)).unwrap();
    assert!(newest()["caption"].is_null());
    let words = "a <b>boat</b> on a lake";
    server.board.caption(1, 1, words.to_owned());
    assert_eq!(newest()["caption"], words);
    server.board.picture(shown(1, 1, Kind::Refined)).unwrap();
    let trial = newest();
    assert_eq!(trial["kinds"][1]["kind"], "refined");
    assert_eq!(trial["caption"], words);
    let url = trial["kinds"][1]["url"].as_str().unwrap().to_owned();
    assert_eq!(server.get(&url).status, 200);
}

#[test]
fn faults_are_not_for_the_bedside() {
    let server = Server::start(Options::default());
    server.board.fault("sentence for the operator".to_owned());
    let mut events = server.follow();
    let data = &events.next().unwrap()["data"];
    assert!(!data.contains("operator"), "{data}");
}

#[test]
fn heart_beats_while_nothing_changes() {
    let server = Server::start(Options {
        heartbeat: Duration::from_millis(50),
        ..Options::default()
    });
    let mut events = server.follow();
    assert_eq!(events.next().unwrap()["event"], "state");
    for _ in 0..3 {
        let beat = events.next().unwrap();
        assert_eq!(beat["event"], "beat");
        let data: Value = serde_json::from_str(&beat["data"]).unwrap();
        assert!(data["server_time_ms"].is_u64());
    }
}

#[test]
fn watchers_are_bounded_and_give_their_place_back() {
    let server = Server::start(Options {
        max_watchers: 2,
        heartbeat: Duration::from_millis(50),
        ..Options::default()
    });
    let mut first = server.follow();
    let mut second = server.follow();
    assert_eq!(first.next().unwrap()["event"], "state");
    assert_eq!(second.next().unwrap()["event"], "state");
    let refused = server.get("/events");
    assert_eq!(refused.status, 503);
    assert_eq!(
        refused.text(),
        "2 browsers already follow this board; close one of them.\n"
    );
    assert_eq!(server.get("/bedside").status, 200);

    drop(second);
    let deadline = Instant::now() + SOON;
    while server.get("/healthz").json()["watchers"] != 1 {
        assert!(Instant::now() < deadline, "the place never came back");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.follow().head.starts_with("HTTP/1.1 200"));
}

#[test]
fn slow_reader_blocks_nobody_and_gets_the_newest_state() {
    let server = Server::start(Options::default());
    let mut slow = server.follow();
    let mut quick = server.follow();
    quick.state();

    let started = Instant::now();
    for volume in 1..=20_000 {
        server.board.volume(1, volume);
    }
    server.board.picture(shown(1, 1, Kind::Blurry)).unwrap();
    assert!(started.elapsed() < SOON, "the writer waited for a browser");

    quick.state_where(|state| !state["trial"].is_null());
    let mut events = 0;
    let state = loop {
        events += 1;
        let state = slow.state();
        if !state["trial"].is_null() {
            break state;
        }
    };
    assert_eq!(state["volume"], 20_000);
    assert!(events < 20_000, "{events} events for 20001 changes");
}

#[test]
fn connection_that_stalls_is_dropped() {
    let server = Server::start(Options {
        stalled_after: Duration::from_millis(800),
        heartbeat: Duration::from_millis(100),
        ..Options::default()
    });
    let mut large = shown(1, 1, Kind::Blurry);
    large.png.resize(display::board::MAX_PICTURE_BYTES, 0);
    server.board.picture(large).unwrap();

    let mut events = server.follow();
    let mut idle = server.connect();
    let mut stuck = server.connect();
    stuck
        .write_all(request("GET", "/pictures/1/1/blurry", "localhost", "").as_bytes())
        .unwrap();
    std::thread::sleep(Duration::from_millis(2_000));

    // Either end of a dropped connection is seen: an end of file, or a reset.
    assert_eq!(idle.read(&mut [0; 16]).unwrap_or(0), 0);
    let mut received = Vec::new();
    let _ = stuck.read_to_end(&mut received);
    assert!(received.len() < display::board::MAX_PICTURE_BYTES);
    for _ in 0..20 {
        assert!(events.next().is_some(), "a stream that is read stays");
    }
}

#[test]
fn shutdown_ends_the_streams_and_the_server() {
    let mut server = Server::start(Options::default());
    let mut events = server.follow();
    events.state();
    let started = Instant::now();
    server.stop();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "waited for the stream"
    );
    assert!(events.next().is_none());
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn shutdown_does_not_wait_for_a_browser_that_does_not_read() {
    let mut server = Server::start(Options::default());
    let mut large = shown(1, 1, Kind::Blurry);
    large.png.resize(display::board::MAX_PICTURE_BYTES, 0);
    server.board.picture(large).unwrap();
    let mut stuck = server.connect();
    stuck
        .write_all(request("GET", "/pictures/1/1/blurry", "localhost", "").as_bytes())
        .unwrap();
    stuck.read_exact(&mut [0; 16]).unwrap();
    let started = Instant::now();
    server.stop();
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn router_follows_the_board_under_a_foreign_server() {
    let board = Board::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    let routes = router(board.clone(), Options::default());
    runtime.spawn(async { axum::serve(listener, routes).await });
    let server = Server {
        address,
        board,
        stop: None,
        thread: None,
    };
    let mut events = server.follow();
    events.state();
    server.board.volume(1, 5);
    assert_eq!(events.state()["volume"], 5);
}
