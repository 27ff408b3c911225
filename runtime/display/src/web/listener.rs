//! Connections, bounded in number and in patience.
//!
//! A browser that stops reading must not keep its place for ever: a connection on which no byte
//! moves in either direction for a while is dropped. Event streams beat more often than that.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// How long to wait after a failed accept, for instance while the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
    stalled_after: Duration,
}

impl BoundedListener {
    pub(super) fn new(
        listener: TcpListener,
        max_connections: usize,
        stalled_after: Duration,
    ) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(max_connections)),
            stalled_after,
        }
    }
}

impl Listener for BoundedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let Ok(place) = self.places.clone().acquire_owned().await else {
            unreachable!("the semaphore of places is never closed");
        };
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    return (
                        Connection::new(stream, self.stalled_after, Some(place)),
                        address,
                    );
                }
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails once nothing has moved on it for a while.
pub(super) struct Connection {
    stream: TcpStream,
    stalled_after: Duration,
    stalled: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    fn new(
        stream: TcpStream,
        stalled_after: Duration,
        place: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            stream,
            stalled_after,
            stalled: Box::pin(tokio::time::sleep(stalled_after)),
            _place: place,
        }
    }

    /// Passes on what moved; what waits, waits no longer than allowed.
    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        moved: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if moved.is_ready() {
            self.stalled
                .as_mut()
                .reset(Instant::now() + self.stalled_after);
            return moved;
        }
        ready!(self.stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let moved = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.watch(context, moved)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, moved)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, moved)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const PATIENCE: Duration = Duration::from_millis(100);

    async fn pair() -> (Connection, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut listener = BoundedListener::new(listener, 1, PATIENCE);
        (listener.accept().await.0, client)
    }

    #[tokio::test]
    async fn peer_that_says_nothing_is_dropped() {
        let (mut connection, _client) = pair().await;
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn peer_that_does_not_read_is_dropped() {
        let (mut connection, _client) = pair().await;
        let error = connection.write_all(&vec![0; 64 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn peer_on_which_something_moves_stays() {
        let (mut connection, mut client) = pair().await;
        for byte in 0..6 {
            tokio::time::sleep(PATIENCE / 2).await;
            client.write_u8(byte).await.unwrap();
            assert_eq!(connection.read_u8().await.unwrap(), byte);
        }
    }

    #[tokio::test]
    async fn connection_above_the_bound_waits_for_a_place() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut listener = BoundedListener::new(listener, 1, PATIENCE);
        let _clients = (
            TcpStream::connect(address).await.unwrap(),
            TcpStream::connect(address).await.unwrap(),
        );
        let first = listener.accept().await;
        assert!(
            tokio::time::timeout(PATIENCE, listener.accept())
                .await
                .is_err()
        );
        drop(first);
        listener.accept().await;
    }
}
