//! Serves the bedside page with gradients in place of decoded pictures, to look at while working
//! on it: `cargo run -p display --example bedside -- [PORT [waiting|still|live]]`.
//!
//! `waiting` has no picture, `still` (the default) one trial, `live` a new trial every 8 s.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use display::web::{Options, serve};
use display::{Board, Kind, SessionInfo, Shown, png};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scene {
    Waiting,
    Still,
    Live,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let port: u16 = arguments.next().map_or(Ok(8787), |port| port.parse())?;
    let scene = match arguments.next().as_deref() {
        None | Some("still") => Scene::Still,
        Some("waiting") => Scene::Waiting,
        Some("live") => Scene::Live,
        Some(other) => return Err(format!("{other} is not waiting, still or live").into()),
    };

    let board = Board::new();
    board.session(SessionInfo {
        id: "1".into(),
        label: "session 2026-03-14".to_owned(),
        random_weights: arguments.next().as_deref() == Some("random"),
        bundle: "example".to_owned(),
    });
    board.run_started(2, 1500.0);
    board.volume(2, 41);

    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    let fill = tokio::spawn(fill(board.clone(), scene));
    let shutdown = async {
        // Without a signal handler the example is ended the hard way, which does no harm.
        let _ = tokio::signal::ctrl_c().await;
    };
    serve(listener, board, Options::default(), shutdown).await?;
    fill.abort();
    Ok(())
}

async fn fill(board: Board, scene: Scene) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if scene == Scene::Waiting {
        return Ok(());
    }
    for trial in 1.. {
        let stimulus_at_ms =
            u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        for (kind, side, wait) in [
            (Kind::Blurry, 64, 900),
            (Kind::Unrefined, 256, 1500),
            (Kind::Refined, 256, 1500),
        ] {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            board.picture(Shown {
                run: 2,
                trial,
                kind,
                tier: "fast".to_owned(),
                width: side,
                height: side,
                png: png::encode(
                    side,
                    side,
                    &landscape(side, trial),
                    &[("Software", "Afterimage"), ("Comment", "a test pattern")],
                )?,
                stimulus_at_ms: Some(stimulus_at_ms),
                decoded_in_ms: 700,
                seed: "1".to_owned(),
                steps: 4,
                fidelity: "edge".to_owned(),
            })?;
            if kind == Kind::Unrefined {
                board.caption(2, trial, "a green hill under a wide sky".to_owned());
            }
            board.volume(2, 41 + trial);
        }
        if scene == Scene::Still {
            break;
        }
        tokio::time::sleep(Duration::from_secs(6)).await;
    }
    Ok(())
}

/// A sky over a hill, `[row, column, channel]`; the hue turns with the trial.
fn landscape(side: u32, trial: u32) -> Vec<u8> {
    let shade = |share: u32| u8::try_from(share.min(255)).unwrap_or(u8::MAX);
    (0..side * side)
        .flat_map(|pixel| {
            let (row, column) = (pixel / side * 255 / side, pixel % side * 255 / side);
            let hill = 150 + column.abs_diff(128) * column.abs_diff(128) / 220;
            let colour = if row > hill {
                [shade(40 + row / 5), shade(90 + column / 4), shade(45)]
            } else {
                [
                    shade(90 + row / 2),
                    shade(130 + row / 3),
                    shade(235 - row / 4),
                ]
            };
            let turn = (trial as usize) % 3;
            [colour[turn], colour[(turn + 1) % 3], colour[(turn + 2) % 3]]
        })
        .collect()
}
