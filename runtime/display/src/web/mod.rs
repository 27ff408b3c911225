//! The board as pages: a bedside page, its pictures, and a stream of what is newest.
//!
//! | Address | Answers |
//! |---|---|
//! | `/` | to `/bedside` |
//! | `/bedside` | the page for the person at the bedside |
//! | `/static/…` | its style, script and icon, built into the program |
//! | `/events` | server-sent events: `state` at once and at every change, `beat` while nothing changes |
//! | `/pictures/{run}/{trial}/{kind}` | one picture, PNG |
//! | `/api/trials` | all trials on the board, session, progress, roles, faults; JSON |
//! | `/healthz` | whether the server answers; JSON |
//!
//! Everything is read-only and made here: no page asks another host for anything. [`serve`] also
//! bounds connections and drops those on which nothing moves; [`router`] alone does not.

mod events;
mod guard;
mod listener;
mod view;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware;
use axum::response::sse::Sse;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::board::{Board, Kind};
use listener::BoundedListener;

/// How long connections may still finish after the shutdown signal.
const DRAIN: Duration = Duration::from_secs(2);

/// Files built into the program: address below `/static/`, media type, content.
const FILES: [(&str, &str, &str); 3] = [
    (
        "bedside.css",
        "text/css; charset=utf-8",
        include_str!("static/bedside.css"),
    ),
    (
        "bedside.js",
        "text/javascript; charset=utf-8",
        include_str!("static/bedside.js"),
    ),
    ("icon.svg", "image/svg+xml", include_str!("static/icon.svg")),
];
const BEDSIDE: &str = include_str!("static/bedside.html");

/// What a site may set about the pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Host names and addresses, without port, by which browsers reach this server besides
    /// `localhost`, `127.0.0.1` and `[::1]`.
    pub hosts: Vec<String>,
    /// Most browsers that follow `/events` at once.
    pub max_watchers: usize,
    /// Most connections at once; more wait to be accepted.
    pub max_connections: usize,
    /// Longest silence on `/events`.
    pub heartbeat: Duration,
    /// A connection on which nothing moves for so long is dropped; longer than `heartbeat`.
    pub stalled_after: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            max_watchers: 32,
            max_connections: 128,
            heartbeat: Duration::from_secs(5),
            stalled_after: Duration::from_secs(30),
        }
    }
}

/// What the handlers share.
#[derive(Clone)]
struct Site {
    board: Board,
    options: Arc<Options>,
    watchers: Arc<Semaphore>,
    /// True once the server is to stop; the caller's own server ends its connections itself.
    closing: Option<watch::Receiver<bool>>,
}

/// The pages as a router, for a server of the caller's.
pub fn router(board: Board, options: Options) -> Router {
    routes(board, options, None)
}

/// Serves the pages until `shutdown` ends, then ends the event streams and lets the other answers
/// finish, for at most two seconds.
///
/// # Errors
/// The listener's local address cannot be read.
pub async fn serve(
    listener: TcpListener,
    board: Board,
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let (close, closing) = watch::channel(false);
    let listener = BoundedListener::new(listener, options.max_connections, options.stalled_after);
    let routes = routes(board, options, Some(closing.clone()));
    tracing::info!(%address, "pages served");

    let served = axum::serve(listener, routes)
        .with_graceful_shutdown(events::closed(closing))
        .into_future();
    let ended = async {
        shutdown.await;
        close.send_replace(true);
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = served => result,
        () = ended => {
            tracing::warn!("connections still open when the pages stopped");
            Ok(())
        }
    }
}

fn routes(board: Board, options: Options, closing: Option<watch::Receiver<bool>>) -> Router {
    let site = Site {
        board,
        watchers: Arc::new(Semaphore::new(options.max_watchers)),
        options: Arc::new(options),
        closing,
    };
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/bedside") }))
        .route("/bedside", get(|| async { html(BEDSIDE) }))
        .route("/static/{file}", get(file))
        .route("/events", get(events))
        .route("/pictures/{run}/{trial}/{kind}", get(picture))
        .route("/api/trials", get(trials))
        .route("/healthz", get(health))
        .fallback(|| async { not_found() })
        .layer(middleware::from_fn_with_state(site.clone(), guard::guard))
        .with_state(site)
}

fn html(page: &'static str) -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response()
}

fn not_found() -> Response {
    (StatusCode::NOT_FOUND, "There is nothing at this address.\n").into_response()
}

async fn file(name: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(name)) = name else {
        return not_found();
    };
    FILES.iter().find(|(file, ..)| *file == name).map_or_else(
        not_found,
        |(_, media_type, content)| {
            ([(header::CONTENT_TYPE, *media_type)], *content).into_response()
        },
    )
}

async fn picture(
    State(site): State<Site>,
    address: Result<Path<(u32, u32, String)>, PathRejection>,
    request: HeaderMap,
) -> Response {
    let Some((png, version)) = address
        .ok()
        .and_then(|Path((run, trial, kind))| Some((run, trial, Kind::from_name(&kind)?)))
        .and_then(|(run, trial, kind)| site.board.file(run, trial, kind))
    else {
        return (
            StatusCode::NOT_FOUND,
            "This picture is not on the board; only the newest trials are kept.\n",
        )
            .into_response();
    };
    let tag = format!("\"{version}\"");
    let has_it = request
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .any(|known| known.as_bytes() == tag.as_bytes());
    if has_it {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response();
    }
    (
        [
            (header::CONTENT_TYPE, "image/png".to_owned()),
            (header::ETAG, tag),
        ],
        png,
    )
        .into_response()
}

async fn trials(State(site): State<Site>) -> Response {
    axum::Json(view::all(&site.board)).into_response()
}

async fn health(State(site): State<Site>) -> Response {
    let watchers = site.options.max_watchers - site.watchers.available_permits();
    axum::Json(view::health(&site.board, watchers)).into_response()
}

async fn events(State(site): State<Site>) -> Response {
    let Ok(place) = site.watchers.clone().try_acquire_owned() else {
        let sentence = format!(
            "{} browsers already follow this board; close one of them.\n",
            site.options.max_watchers
        );
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            [(header::RETRY_AFTER, "5")],
            sentence,
        )
            .into_response();
    };
    let watcher = events::Watcher::new(site.board, site.options.heartbeat, site.closing, place);
    let stream = futures_util::stream::unfold(watcher, |mut watcher| async move {
        let event = watcher.next().await?;
        Some((Ok::<_, Infallible>(event), watcher))
    });
    Sse::new(stream).into_response()
}
