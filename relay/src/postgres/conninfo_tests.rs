use super::*;
use crate::postgres::tls_settings::SslMode;

fn none(_: &str) -> Option<String> {
    None
}

fn parse(text: &str) -> ConnInfo {
    ConnInfo::read(text, &none).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn both_forms_say_the_same() {
    let url = parse(
        "postgres://u:p%40ss@a:1,b:2/db?sslmode=verify-full&sslrootcert=%2Fca.pem&target_session_attrs=read-write",
    );
    let pairs = parse(
        r"host=a,b port=1,2 user=u password='p@ss' dbname=db sslmode = verify-full sslrootcert='/ca.pem' target_session_attrs=read-write",
    );
    for info in [url, pairs] {
        assert_eq!(info.tls.mode, SslMode::VerifyFull);
        assert_eq!(info.tls.root_cert.as_deref(), Some("/ca.pem".as_ref()));
        assert!(info.read_write);
        let seen: Vec<_> = info.servers.iter().map(|server| (server.name.as_str(), server.port)).collect();
        assert_eq!(seen, [("a", 1), ("b", 2)]);
        assert!(info.servers.iter().all(|server| server.config.get_password() == Some(b"p@ss")));
        assert_eq!(info.target(), "a,b/db");
    }
}

#[test]
fn each_server_has_its_port_and_all_else_in_common() {
    let info = parse("host=a,fd00::5,/run port=1,2,3 user=u password=p dbname=d");
    let places: Vec<_> = info.servers.iter().map(|server| (server.at.to_string(), server.port)).collect();
    assert_eq!(places, [("a".to_owned(), 1), ("fd00::5".to_owned(), 2), ("/run".to_owned(), 3)]);
    assert!(info.servers.iter().all(|server| server.config.get_user() == Some("u")));
    assert_eq!(info.servers[2].config.get_ssl_mode(), TlsUse::Disable);
    assert_eq!(parse("host=a,b port=7").servers[1].port, 7);
    assert_eq!(parse("host=a hostaddr=10.0.0.1").servers[0].at, At::Address([10, 0, 0, 1].into()));
    assert_eq!(parse("host=a hostaddr=10.0.0.1").servers[0].name, "a");
    assert!(ConnInfo::read("host=a,b,c port=1,2", &none).is_err());
}

#[test]
fn a_connection_that_only_listens_notices_a_lost_peer() {
    let info = parse("host=a user=u");
    assert!(info.keepalive.is_some_and(|keepalive| keepalive.idle < Duration::from_secs(60)));
    assert!(info.tcp_user_timeout.is_some());
    let info = parse("host=a tcp_user_timeout=2500 keepalives_count=7 keepalives_idle=0 connect_timeout=0");
    assert_eq!(info.tcp_user_timeout, Some(Duration::from_millis(2500)));
    assert_eq!(info.keepalive.map(|keepalive| keepalive.count), Some(7));
    assert_eq!(info.connect_timeout, Duration::from_secs(10));
    let info = parse("host=a tcp_user_timeout=0 keepalives=0");
    assert!(info.tcp_user_timeout.is_none() && info.keepalive.is_none());
}

#[test]
fn what_libpq_knows_is_taken() {
    for (keys, warnings) in [
        ("options='-c a=b' application_name=x fallback_application_name=y client_encoding=UTF8", 0),
        ("gssencmode=prefer channel_binding=prefer sslsni=1", 1),
        ("sslcompression=0 krbsrvname=postgres gsslib=gssapi client_encoding=LATIN1", 4),
        ("keepalives=1 keepalives_idle=30 keepalives_interval=5 keepalives_count=3 tcp_user_timeout=0", 0),
        ("load_balance_hosts=random sslnegotiation=postgres replication=false passfile=/nowhere", 1),
        ("ssl_min_protocol_version=TLSv1.2 ssl_max_protocol_version=TLSv1.3 sslcertmode=allow", 0),
        ("max_protocol_version=3.2 min_protocol_version=3.0", 1),
        ("gssdelegation=0 sslmode=require sslnegotiation=direct", 1),
    ] {
        assert_eq!(parse(&format!("host=a {keys}")).warnings.len(), warnings, "{keys}");
    }
    assert!(parse("host=a load_balance_hosts=random").shuffled);
}

#[test]
fn what_would_be_weaker_than_it_says_is_refused() {
    for keys in [
        "gssencmode=require",
        "require_auth=scram-sha-256",
        "requirepeer=postgres",
        "sslcrldir=/x",
        "sslpassword=x sslkey=/x sslcert=/y",
        "sslcertmode=require",
        "ssl_min_protocol_version=TLSv1.4",
        "ssl_max_protocol_version=TLSv1.1",
        "ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
        "sslnegotiation=direct",
        "min_protocol_version=3.2",
        "replication=database",
        "target_session_attrs=standby",
        "channel_binding=perhaps",
    ] {
        assert!(ConnInfo::read(&format!("host=a {keys}"), &none).is_err(), "{keys}");
    }
}

#[test]
fn the_environment_and_the_password_file_fill_in() {
    let path = std::env::temp_dir().join(format!("outbox-relay-passwords-{}", std::process::id()));
    std::fs::write(&path, "a:1:d:u:first\nb:*:*:*:second").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let environment = |name: &str| match name {
        "PGHOST" => Some("a,b,c".to_owned()),
        "PGPORT" => Some("1".to_owned()),
        "PGUSER" => Some("u".to_owned()),
        "PGPASSFILE" => path.to_str().map(str::to_owned),
        "PGSSLMODE" => Some("require".to_owned()),
        _ => None,
    };
    let info = ConnInfo::read("dbname=d", &environment).ok().unwrap();
    let passwords: Vec<_> = info.servers.iter().map(|server| server.config.get_password()).collect();
    assert_eq!(passwords, [Some(&b"first"[..]), Some(&b"second"[..]), None]);
    assert_eq!(info.tls.mode, SslMode::Require);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn without_a_host_it_is_the_local_server() {
    for text in ["postgres:///db", "dbname=x password=y", ""] {
        let server = &parse(text).servers[0];
        assert!(matches!(&server.at, At::Directory(_)) || server.at == At::Name("localhost".into()));
    }
}

#[test]
fn what_is_wrong_is_said_without_the_password() {
    for text in [
        "postgres://u:hunter2@a/db?sslmode=maybe",
        "postgres://u:hunter2@a:port/db",
        "postgres://u:hunter2@a/db?no_such_key=1",
        "postgres://u:1,hunter2:x@a/db",
        "host=a password=hunter2 target_session_attrs=standby",
        "host=a password='hunter2",
        "host=hunter2@b password=x",
        "host=a password=hunter2 sslcert=/x",
        "host=a password=hunter2 hunter2=3",
        "host=a port=hunter2",
        "host=a hostaddr=hunter2",
        "host=a connect_timeout=hunter2",
        "hunter2",
    ] {
        if let Err(error) = ConnInfo::read(text, &none) {
            let error = error.to_string();
            assert!(!error.contains("hunter2"), "{error}");
            assert!(!error.contains('\n'));
        } else {
            assert!(text.contains("1,hunter2"), "{text}");
        }
    }
}
