use std::fs;

use clap::{CommandFactory, Parser};
use figment::Jail;

use super::*;

fn flags(arguments: &[&str]) -> Settings {
    let arguments = std::iter::once(&"swiftcache-broker").chain(arguments);
    Flags::try_parse_from(arguments).unwrap().settings
}

/// Runs a test while no other test changes the environment, which all tests of the process share.
#[expect(clippy::result_large_err, reason = "figment's Jail dictates the type")]
fn alone(test: impl FnOnce(&mut Jail)) {
    Jail::expect_with(|jail| {
        test(jail);
        Ok(())
    });
}

fn problem(file: &str, arguments: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broker.toml");
    fs::write(&path, file).unwrap();
    let error = Config::load(Some(&path), &flags(arguments)).unwrap_err();
    assert_eq!(error.exit_status(), 2);
    error.to_string()
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    alone(|jail| {
        jail.create_file(
            "broker.toml",
            "drain_ms = 10\npin_ms = 10\nmax_leases = 10\n",
        )
        .unwrap();
        jail.set_env("SWIFTCACHE_PIN_MS", "20");
        jail.set_env("SWIFTCACHE_MAX_LEASES", "20");
        jail.set_env("SWIFTCACHE_PORT", "tcp://10.0.0.1:1");
        let flags = flags(&["--max-leases", "30"]);
        let config = Config::load(Some(Path::new("broker.toml")), &flags).unwrap();
        assert_eq!(config.max_sessions, Config::default().max_sessions);
        assert_eq!(config.drain_ms, 10);
        assert_eq!(config.pin_ms, 20);
        assert_eq!(config.max_leases, 30);

        jail.set_env("SWIFTCACHE_SOCKET_GROUP", "10002");
        let config = Config::load(None, &flags).unwrap();
        assert_eq!(config.socket_group.as_deref(), Some("10002"));

        jail.set_env("SWIFTCACHE_PIN_MS", "soon");
        let error = Config::load(None, &flags).unwrap_err().to_string();
        assert!(error.contains("SWIFTCACHE_PIN_MS"), "{error}");
    });
}

#[test]
fn what_is_printed_reads_back_the_same() {
    alone(|_| {
        let flags = flags(&[
            "--listen-tcp",
            "127.0.0.1:7",
            "--topology",
            "pcie-4",
            "--otlp-endpoint",
            "http://127.0.0.1:4317",
        ]);
        let config = Config::load(None, &flags).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broker.toml");
        fs::write(&path, config.to_toml().unwrap()).unwrap();
        assert_eq!(
            Config::load(Some(&path), &Settings::default()).unwrap(),
            config
        );
    });
}

#[test]
fn a_wrong_setting_is_named() {
    alone(|_| {
        let long = format!("socket = \"/{}\"", "s".repeat(120));
        for (file, arguments, named) in [
            ("drain_sm = 10", vec![], "drain_sm: is no setting"),
            ("drain_ms = \"soon\"", vec![], "drain_ms"),
            ("drain_ms = 0", vec![], "drain_ms: is 0; takes 1 to"),
            ("drain_ms = 700000", vec![], "drain_ms"),
            ("max_leases = 0", vec![], "max_leases"),
            ("log = \"=,=\"", vec![], "log"),
            ("log_format = \"xml\"", vec![], "log_format"),
            ("probe = \"guess\"", vec![], "probe"),
            ("listen_tcp = \"nowhere\"", vec![], "listen_tcp"),
            ("listen_tcp = \"0.0.0.0:1\"", vec![], "beyond loopback"),
            (
                "otlp_endpoint = \"127.0.0.1:4317\"",
                vec![],
                "otlp_endpoint: ",
            ),
            (
                "otlp_endpoint = \"https://c:4317\"",
                vec![],
                "otlp_endpoint: ",
            ),
            ("tls_cert = \"c\"", vec![], "tls_cert, tls_key"),
            (
                "topology = \"hgx-8\"",
                vec!["--probe", "nvml"],
                "topology: is of no use",
            ),
            ("not toml", vec![], "broker.toml"),
            (long.as_str(), vec![], "socket: is 121 bytes"),
            ("fd_socket = \"/a\"\nsocket = \"/a\"", vec![], "fd_socket"),
        ] {
            let problem = problem(file, &arguments);
            assert!(problem.contains(named), "{problem:?} lacks {named:?}");
        }
    });
}

#[test]
fn sizes_are_what_people_write_wherever_they_stand() {
    alone(|jail| {
        jail.create_file("broker.toml", "namespace_quota_bytes = \"1.5GiB\"\n")
            .unwrap();
        jail.set_env("SWIFTCACHE_SESSION_QUOTA_BYTES", "64 MB");
        let file = Some(Path::new("broker.toml"));
        let config = Config::load(file, &Settings::default()).unwrap();
        assert_eq!(config.namespace_quota_bytes, Some(3 << 29));
        assert_eq!(config.session_quota_bytes, Some(64_000_000));
        let flags = flags(&["--namespace-quota-bytes=2g"]);
        let config = Config::load(file, &flags).unwrap();
        assert_eq!(config.namespace_quota_bytes, Some(2 << 30));
    });
    alone(|_| {
        let problem = problem("session_quota_bytes = \"5 parsecs\"", &[]);
        assert!(
            problem.contains("session_quota_bytes") && problem.contains("parsecs"),
            "{problem}"
        );
    });
}

/// Whoever mistypes a variable believes that it holds. The twin: variables of others with the prefix are none of the broker's
/// business.
#[test]
fn a_mistyped_variable_is_named() {
    let keys = keys();
    let named = |variable: &str| mistyped(std::iter::once(variable.to_owned()), &keys);
    for (variable, meant) in [
        ("SWIFTCACHE_DRAIM_MS", "SWIFTCACHE_DRAIN_MS"),
        ("SWIFTCACHE_SOKCET", "SWIFTCACHE_SOCKET"),
        ("SWIFTCACHE_SOCKETS", "SWIFTCACHE_SOCKET"),
        ("SWIFTCACHE_METRIC_LISTEN", "SWIFTCACHE_METRICS_LISTEN"),
        ("SWIFTCACHE_TLS_CERTS", "SWIFTCACHE_TLS_CERT"),
    ] {
        let problem = named(variable).unwrap_or_default();
        let expected = format!("{variable}: is no setting; {meant} is");
        assert_eq!(problem, expected);
    }
    for variable in [
        "SWIFTCACHE_DRAIN_MS",
        "SWIFTCACHE_CONFIG",
        "SWIFTCACHE_PORT",
        "SWIFTCACHE_PORT_9477_TCP_ADDR",
        "SWIFTCACHE_SERVICE_PORT",
        "SWIFTCACHE_LOAD",
        "SWIFTCACHE_LOOKUP_MS",
        "SWIFTCACHE_MAX_LEASED_BYTES",
        "SWIFTCACHE_LEND_DRAIN_MS",
        "SWIFTCACHE_STREAM_STEP_MS",
        "SWIFTCACHE_TENANT",
        "SWIFTCACHE_LIBNVML",
        "SWIFTCACHE_DONATE_FLAGS",
        "SWIFTCACHE_FAULT_SEED",
        "PATH",
    ] {
        assert_eq!(named(variable), None, "{variable}");
    }
}

#[test]
fn a_missing_file_is_named() {
    alone(|_| {
        let missing = Path::new("/nowhere/broker.toml");
        let error = Config::load(Some(missing), &Settings::default()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/broker.toml"));
    });
}

#[test]
fn tls_opens_tcp_beyond_loopback() {
    alone(|_| {
        let flags = flags(&[
            "--listen-tcp=0.0.0.0:1",
            "--tls-cert=c",
            "--tls-key=k",
            "--tls-client-ca=a",
        ]);
        Config::load(None, &flags).unwrap();
    });
}

#[test]
fn every_setting_has_a_flag_and_every_flag_a_setting() {
    Flags::command().debug_assert();
    let set = Config {
        fd_socket: Some("a".into()),
        socket_group: Some("a".to_owned()),
        admin_group: Some("a".to_owned()),
        state_dir: Some("a".into()),
        listen_tcp: Some(([127, 0, 0, 1], 1).into()),
        tls_cert: Some("a".into()),
        tls_key: Some("a".into()),
        tls_client_ca: Some("a".into()),
        metrics_listen: Some(([127, 0, 0, 1], 1).into()),
        otlp_endpoint: Some("a".to_owned()),
        topology: Some("a".to_owned()),
        namespace_quota_bytes: Some(1),
        session_quota_bytes: Some(1),
        namespace_weights: Some("a=1".to_owned()),
        tenant_weights: Some("1000=1".to_owned()),
        ..Config::default()
    };
    let table: toml::Table = set.to_toml().unwrap().parse().unwrap();
    let mut settings: Vec<String> = table.keys().cloned().collect();
    let mut flags = keys();
    settings.sort();
    flags.sort();
    assert_eq!(settings, flags);
}

#[test]
fn the_fd_socket_and_the_ledger_lie_beside_the_socket() {
    let config = Config::default();
    let run = Path::new("/run/swiftcache");
    assert_eq!(config.fd_socket(), run.join("broker-fd.sock"));
    assert_eq!(config.state_dir(), run);
    let here = Config {
        socket: "broker.sock".into(),
        ..config
    };
    assert_eq!(here.state_dir(), Path::new("."));
    assert_eq!(here.fd_socket(), Path::new("broker-fd.sock"));
}
