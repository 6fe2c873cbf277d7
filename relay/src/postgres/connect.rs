//! Connecting: one session of PostgreSQL, with what it tells us unasked, and the means to cancel what it does.

use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::config::SslMode as TlsUse;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, CancelToken, Client, Connection, Notification};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::conninfo::{ConnInfo, Server};
use super::readable::{Readable, ReadableTls};
use super::socket::{self, Place, Socket};
use super::tls;
use super::tls_settings::SslMode;
use crate::error::{Error, Result};

/// From a connection to a session that takes queries. What accepts and then says nothing is no server.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Makes sessions; cheap to clone.
#[derive(Clone)]
pub struct Connector {
    info: std::sync::Arc<ConnInfo>,
    tls: MakeRustlsConnect,
    notices: fn(&str),
}

/// A session. Its task ends when the connection does, and the connection ends when this is dropped.
pub struct Connected {
    pub client: Client,
    /// Ends with the reason when the connection is lost.
    pub driver: Driver,
    pub cancel: Cancel,
    /// The server stores texts in UTF-8.
    pub utf8: bool,
    server: usize,
}

/// Aborts the connection's task when dropped, so that a session never outlives its owner.
pub struct Driver(JoinHandle<Result<()>>);

impl Driver {
    pub async fn ended(&mut self) -> Result<()> {
        match (&mut self.0).await {
            Ok(result) => result,
            Err(join) => Err(Error::Server(format!("connection task: {join}"))),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Ends what a session is doing, in the server.
#[derive(Clone)]
pub struct Cancel {
    connector: Connector,
    server: usize,
    place: Place,
    tls_use: TlsUse,
    token: CancelToken,
}

impl Cancel {
    /// Asks in the background; nobody waits for it, and a server that is not there has nothing to cancel.
    pub fn spawn(&self) {
        let cancel = self.clone();
        // While the runtime ends there is nothing left to ask with.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Ok(Err(error)) = timeout(TIMEOUT, cancel.ask()).await {
                tracing::debug!(%error, "a statement that was given up could not be cancelled");
            }
        });
    }

    async fn ask(&self) -> Result<()> {
        let Connector { info, tls, .. } = &self.connector;
        let server = &info.servers[self.server];
        let (_, socket) = socket::open(info, std::slice::from_ref(&self.place))
            .await
            .map_err(|error| unreachable_at(server, &error))?;
        let tls = make_tls(tls, &server.name)?;
        Ok(self.token.cancel_query_raw(Readable::new(socket, self.tls_use != TlsUse::Disable), tls).await?)
    }
}

impl Connector {
    pub fn new(info: ConnInfo) -> Result<Self> {
        let tls = tls::connector(&info.tls)?;
        let notices = |message: &str| tracing::debug!(message, "notice from PostgreSQL");
        Ok(Connector { info: std::sync::Arc::new(info), tls, notices })
    }

    /// Gives what the server remarks to `notices`, instead of the debug log.
    pub fn with_notices(self, notices: fn(&str)) -> Self {
        Connector { notices, ..self }
    }

    pub fn target(&self) -> String {
        self.info.target()
    }

    /// Connects to the first of the servers that answers as it should. Notifications go to `notified`.
    pub async fn connect(&self, notified: Option<UnboundedSender<Notification>>) -> Result<Connected> {
        let mut order: Vec<usize> = (0..self.info.servers.len()).collect();
        if self.info.shuffled {
            crate::backoff::shuffle(&mut order);
        }
        let mut refused = Error::Configuration("DATABASE_URL names no host".into());
        for server in order {
            match self.connect_to(server, notified.clone()).await {
                Err(error) => refused = error,
                connected => return connected,
            }
        }
        Err(refused)
    }

    /// A second session with the same server, at the same address.
    pub async fn connect_beside(&self, first: &Connected) -> Result<Connected> {
        let places = std::slice::from_ref(&first.cancel.place);
        self.connect_at(first.server, places, first.cancel.tls_use, None).await.map(|(_, connected)| connected)?
    }

    /// Tries its addresses until one is a server that takes us.
    async fn connect_to(&self, server: usize, notified: Option<UnboundedSender<Notification>>) -> Result<Connected> {
        let of = &self.info.servers[server];
        let mut places = socket::places(&self.info, of).await.map_err(|error| unreachable_at(of, &error))?;
        loop {
            let first_use = of.config.get_ssl_mode();
            let (place, result) = self.connect_at(server, &places, first_use, notified.clone()).await?;
            let result = match result {
                Err(error) if self.may_use_tls(first_use) && refused_without_tls(&error) => {
                    let at = std::slice::from_ref(&place);
                    self.connect_at(server, at, TlsUse::Require, notified.clone()).await?.1
                }
                result => result,
            };
            places.retain(|other| *other != place);
            match result {
                Err(_) if !places.is_empty() => {}
                result => return result,
            }
        }
    }

    /// `sslmode=allow`: with TLS only if the server insists.
    fn may_use_tls(&self, used: TlsUse) -> bool {
        self.info.tls.mode == SslMode::Allow && used == TlsUse::Disable
    }

    /// Connects to whichever place answers first, and says what came of it. An error of its own: none answered.
    async fn connect_at(
        &self,
        server: usize,
        places: &[Place],
        tls_use: TlsUse,
        notified: Option<UnboundedSender<Notification>>,
    ) -> Result<(Place, Result<Connected>)> {
        let of = &self.info.servers[server];
        let (place, socket) = socket::open(&self.info, places).await.map_err(|error| unreachable_at(of, &error))?;
        let limit = TIMEOUT.max(self.info.connect_timeout);
        let session = async {
            let (client, connection) = self.start(of, socket, tls_use).await?;
            let cancel =
                Cancel { connector: self.clone(), server, place: place.clone(), tls_use, token: client.cancel_token() };
            let utf8 = connection.parameter("server_encoding") == Some("UTF8");
            let driver = Driver(tokio::spawn(drive(connection, notified, self.notices)));
            let connected = Connected { client, driver, cancel, utf8, server };
            if self.info.read_write {
                takes_writes(&connected.client).await?;
            }
            Ok(connected)
        };
        let silent = |_| Error::Server(format!("{} did not answer within {} s", name_of(of), limit.as_secs()));
        let result = timeout(limit, session).await.map_err(silent).flatten();
        Ok((place, result))
    }

    async fn start(&self, server: &Server, socket: Socket, tls_use: TlsUse) -> Result<(Client, OurConnection)> {
        let tls = make_tls(&self.tls, &server.name)?;
        let mut config = server.config.clone();
        config.ssl_mode(tls_use);
        let asks = tls_use != TlsUse::Disable
            && config.get_ssl_negotiation() == tokio_postgres::config::SslNegotiation::Postgres;
        Ok(config.connect_raw(Readable::new(socket, asks), tls).await?)
    }
}

type OurTls = ReadableTls<<MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect>;
type OurConnection = Connection<Readable<Socket>, Readable<<MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>>;

fn make_tls(tls: &MakeRustlsConnect, name: &str) -> Result<OurTls> {
    let made = MakeTlsConnect::<Socket>::make_tls_connect(&mut tls.clone(), name);
    made.map(ReadableTls).map_err(|error| Error::Server(format!("TLS: {error}")))
}

async fn drive(
    mut connection: OurConnection,
    notified: Option<UnboundedSender<Notification>>,
    notices: fn(&str),
) -> Result<()> {
    loop {
        match std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notification(notification))) => {
                if let Some(notified) = &notified {
                    // The receiver is gone only while the session ends.
                    let _ = notified.send(notification);
                }
            }
            Some(Ok(AsyncMessage::Notice(notice))) => notices(notice.message()),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.into()),
            None => return Ok(()),
        }
    }
}

/// As libpq asks: whether a transaction of this session could write.
async fn takes_writes(client: &Client) -> Result<()> {
    let rows = client.simple_query("SHOW transaction_read_only").await?;
    let read_only = rows.iter().any(|row| match row {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0) == Some("on"),
        _ => false,
    });
    match read_only {
        true => Err(Error::Server("the server does not take writes".into())),
        false => Ok(()),
    }
}

fn name_of(server: &Server) -> String {
    format!("PostgreSQL at {}:{}", server.at, server.port)
}

fn unreachable_at(server: &Server, error: &std::io::Error) -> Error {
    Error::Server(format!("can't connect to {}: {error}", name_of(server)))
}

fn refused_without_tls(error: &Error) -> bool {
    matches!(error, Error::Database(error)
        if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION))
}
