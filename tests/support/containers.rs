//! Containers for tests: PostgreSQL, an S3 server and pgkeep, each in one of its own, on networks of their own that can be
//! cut, and healed again.
//!
//! The image and its majors are `PGKEEP_CONTAINERS`, which `testenv/test.sh` has from `testenv/containers.sh`. Without it a
//! test passes and says that it was skipped; the last lines of `testenv/test.sh` say so, too. Where a registry can be
//! reached, `PGKEEP_CONTAINERS_POSTGRES_17=postgres:17` makes servers of that major from another image, the official one say.
//!
//! Everything that is made carries a label with this process's number and start. A [`World`] removes its own when it is
//! dropped; what a test that was killed has left is removed when the next one begins, and at the end of `testenv/test.sh`.
//!
//! Not a part of `support`, so that only the tests that need it are built with it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pgkeep::pg::conninfo::Environment;
use pgkeep::pg::{ConnInfo, ConnectOptions, PgError, Session};
use testcontainers::bollard::Docker;
use testcontainers::bollard::models::{
    NetworkConnectRequest, NetworkCreateRequest, NetworkDisconnectRequest, VolumeCreateRequest,
};
use testcontainers::bollard::query_parameters::{KillContainerOptions, RemoveVolumeOptions};
use testcontainers::core::client::docker_client_instance;
use testcontainers::core::{AccessMode, ExecCommand, Mount};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, GenericImage, ImageExt};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::support::{note, ok};

/// Every wait for a condition.
pub const SOON: Duration = Duration::from_secs(90);
const LABEL: &str = "pgkeep.test";
const IMAGE: &str = "PGKEEP_CONTAINERS";
/// The port of the S3 server.
pub const S3_PORT: u16 = 9000;
/// Where `/handed` goes, with mode and owner that pgkeep asks for.
pub const CONFIG: &str = "/etc/pgkeep/pgkeep.toml";

/// Containers, networks and volumes of one test.
pub struct World {
    pub major: u32,
    image: String,
    docker: Docker,
    /// What a container or network of this world is called in full: `<prefix>-<name>`.
    prefix: String,
    label: String,
    containers: BTreeMap<String, ContainerAsync<GenericImage>>,
    networks: BTreeSet<String>,
    volumes: BTreeSet<String>,
    /// Files that every container is given, by name; they go into `/etc/pgkeep`.
    pub handed: BTreeMap<String, String>,
    /// The environment of every container.
    pub environment: BTreeMap<String, String>,
    runtime: Runtime,
}

/// A container that is to be.
#[derive(Debug, Default, Clone)]
pub struct Wanted<'a> {
    pub name: &'a str,
    pub networks: &'a [&'a str],
    /// Volume, and where it is mounted.
    pub volumes: &'a [(&'a str, &'a str)],
    /// Files and folders of the host, and where they are mounted, to be read.
    pub files: Vec<(String, String)>,
    /// Run by `/bin/sh` as root, when all networks are there; `$as_postgres` is what comes before a command of the server's.
    pub script: String,
    pub image: Option<String>,
}

impl World {
    /// With servers of the first of these majors that can be had; `None`, and words, where there are no containers.
    pub fn new(test: &str, majors: &[u32]) -> Option<World> {
        let Some(given) = std::env::var(IMAGE).ok().filter(|value| !value.is_empty()) else {
            eprintln!("SKIPPED: no containers; {IMAGE} is not set (testenv/containers.sh)");
            return None;
        };
        let (image, there) = given.split_once(' ').expect("an image and its majors");
        let there: Vec<u32> = there.split(' ').map(|major| major.parse().expect("a major")).collect();
        let had = |major: &&u32| there.contains(major) || postgres_image(**major).is_some();
        let major = *majors.iter().find(had).or(there.last()).expect("at least one major");
        note("containers", &major.to_string());

        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("testenv/containers.sh");
        assert!(ok(Command::new(script).arg("--sweep").status()).success(), "containers.sh --sweep");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let docker = ok(runtime.block_on(docker_client_instance()));
        let pid = std::process::id();
        Some(World {
            major,
            image: image.to_owned(),
            docker,
            prefix: format!("pgkeep-{pid}-{test}"),
            label: format!("{pid}.{}", started(pid)),
            containers: BTreeMap::new(),
            networks: BTreeSet::new(),
            volumes: BTreeSet::new(),
            handed: BTreeMap::new(),
            environment: BTreeMap::new(),
            runtime,
        })
    }

    /// The name that resolves in this world's networks.
    pub fn full(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn labels(&self) -> Option<HashMap<String, String>> {
        Some(HashMap::from([(LABEL.to_owned(), self.label.clone())]))
    }

    pub fn network(&mut self, name: &str) {
        let name = self.full(name);
        let wanted = NetworkCreateRequest { name: name.clone(), labels: self.labels(), ..Default::default() };
        ok(self.runtime.block_on(self.docker.create_network(wanted)));
        self.networks.insert(name);
    }

    /// A volume on the host's disk; or in memory, of so many MiB.
    pub fn volume(&mut self, name: &str, memory_mib: Option<u32>) {
        let name = self.full(name);
        let in_memory =
            |mib| [("type", "tmpfs".into()), ("device", "tmpfs".into()), ("o", format!("size={mib}m,mode=1777"))];
        let options = memory_mib.map(|mib| in_memory(mib).into_iter().map(|(k, v)| (k.to_owned(), v)).collect());
        let (labels, name_too) = (self.labels(), Some(name.clone()));
        let wanted = VolumeCreateRequest { name: name_too, labels, driver_opts: options, ..Default::default() };
        ok(self.runtime.block_on(self.docker.create_volume(wanted)));
        self.volumes.insert(name);
    }

    /// Removes a volume and what is on it.
    pub fn remove_volume(&mut self, name: &str) {
        let name = self.full(name);
        ok(self.runtime.block_on(self.docker.remove_volume(&name, None::<RemoveVolumeOptions>)));
        self.volumes.remove(&name);
    }

    /// Starts a container. It is there when this returns; that it does its work is the caller's to wait for.
    pub fn start(&mut self, wanted: Wanted<'_>) {
        let image = wanted.image.as_deref().unwrap_or(&self.image);
        let (repository, tag) = image.rsplit_once(':').expect("an image with a tag");
        let script = format!(
            "set -e
             until set -- /sys/class/net/eth*; [ $# -ge {} ]; do sleep 0.05; done
             mkdir -p /etc/pgkeep /run/postgresql /handed
             for file in /handed/*; do [ ! -f $file ] || cp $file /etc/pgkeep/; done
             chown -R postgres:postgres /etc/pgkeep /run/postgresql; chmod -R u=rwX,go= /etc/pgkeep
             as_postgres='setpriv --reuid=postgres --regid=postgres --clear-groups'
             {}",
            wanted.networks.len(),
            wanted.script
        );
        let major = self.major;
        let path =
            format!("/servers/{major}:/usr/lib/postgresql/{major}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        let mut request = GenericImage::new(repository, tag)
            .with_entrypoint("/bin/sh")
            .with_cmd(["-c", &script])
            .with_container_name(self.full(wanted.name))
            .with_network(self.full(wanted.networks[0]))
            .with_label(LABEL, &self.label)
            .with_env_var("PATH", path)
            .with_env_var("HOME", "/tmp");
        for (name, value) in &self.environment {
            request = request.with_env_var(name, value);
        }
        let program = (env!("CARGO_BIN_EXE_pgkeep").to_owned(), "/usr/local/bin/pgkeep".to_owned());
        for (from, to) in wanted.files.into_iter().chain([program]) {
            request = request.with_mount(Mount::bind_mount(from, to).with_access_mode(AccessMode::ReadOnly));
        }
        for (name, at) in wanted.volumes {
            request = request.with_mount(Mount::volume_mount(self.full(name), *at));
        }
        for (name, text) in &self.handed {
            request = request.with_copy_to(format!("/handed/{name}"), text.clone().into_bytes());
        }
        let container = ok(self.runtime.block_on(request.start()));
        self.containers.insert(wanted.name.to_owned(), container);
        for network in &wanted.networks[1..] {
            self.heal(wanted.name, network);
        }
    }

    /// PostgreSQL on the volume at `/data`. Where that is empty, `make` is run by the shell to make `/data/pg`; without it
    /// there will be a new cluster.
    pub fn postgres(&mut self, name: &str, networks: &[&str], volumes: &[(&str, &str)], make: Option<&str>) {
        let new = format!(
            "$as_postgres initdb -D /data/pg -A trust -U postgres --locale=C -E UTF8 --no-sync --data-checksums \
               --wal-segsize=4 >/dev/null
             echo \"{CONF}\" >> /data/pg/postgresql.conf
             printf 'host all all all trust\\nhost replication all all trust\\n' >> /data/pg/pg_hba.conf"
        );
        let make = make.unwrap_or(&new);
        let script = format!(
            "chown postgres:postgres /data
             if [ ! -d /data/pg ]; then
               {make}
             fi
             exec $as_postgres postgres -D /data/pg -c listen_addresses=* -c unix_socket_directories=/run/postgresql \
               -c fsync=off -c logging_collector=off"
        );
        let image = postgres_image(self.major);
        self.start(Wanted { name, networks, volumes, script, image, ..Wanted::default() });
    }

    /// The server answers, and accepts writes if it shall.
    pub fn wait_ready(&mut self, name: &str, writes: bool) {
        let sql = if writes { "SELECT NOT pg_is_in_recovery()" } else { "SELECT true" };
        let what = format!("{name} to answer {sql}");
        wait_for(&what, || {
            self.assert_runs(name);
            self.try_sql(name, sql).as_deref() == Ok("t")
        });
    }

    /// An S3 server whose objects lie in memory. It is the test binary itself, run again.
    pub fn s3(&mut self, name: &str, networks: &[&str], test: &str) {
        let program = ok(std::env::current_exe()).display().to_string();
        let files = vec![(program, "/usr/local/bin/s3_server".to_owned())];
        let script = format!("exec env PGKEEP_TEST_S3_LISTEN=0.0.0.0:{S3_PORT} s3_server --exact {test} --nocapture");
        self.start(Wanted { name, networks, files, script, ..Wanted::default() });
    }

    // ---- what happens to them

    /// The network is gone for this container: nothing is refused, packets are lost.
    pub fn cut(&self, name: &str, network: &str) {
        let request = NetworkDisconnectRequest { container: self.full(name), force: Some(true) };
        ok(self.runtime.block_on(self.docker.disconnect_network(&self.full(network), request)));
    }

    /// And back.
    pub fn heal(&self, name: &str, network: &str) {
        let request = NetworkConnectRequest { container: self.full(name), ..Default::default() };
        ok(self.runtime.block_on(self.docker.connect_network(&self.full(network), request)));
    }

    /// Its processes do nothing until it goes on.
    pub fn pause(&self, name: &str) {
        ok(self.runtime.block_on(self.containers[name].pause()));
    }

    pub fn go_on(&self, name: &str) {
        ok(self.runtime.block_on(self.containers[name].unpause()));
    }

    /// SIGKILL to all that runs in it; it is gone with all that was in it and on no volume.
    pub fn destroy(&mut self, name: &str) {
        let container = self.containers.remove(name).expect("a container");
        ok(self.runtime.block_on(self.docker.kill_container(container.id(), None::<KillContainerOptions>)));
        ok(self.runtime.block_on(container.rm()));
    }

    #[track_caller]
    pub fn assert_runs(&self, name: &str) {
        let runs = ok(self.runtime.block_on(self.containers[name].is_running()));
        assert!(runs, "{name} has ended:\n{}", self.log(name));
    }

    // ---- what is asked of them

    /// All that it has written to stdout and stderr.
    pub fn log(&self, name: &str) -> String {
        let container = &self.containers[name];
        let both = async { (container.stdout_to_vec().await, container.stderr_to_vec().await) };
        let (out, err) = self.runtime.block_on(both);
        let text = |bytes: Result<Vec<u8>, _>| bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        format!("{}{}", text(out).unwrap_or_default(), text(err).unwrap_or_default())
    }

    #[track_caller]
    pub fn wait_log(&self, name: &str, words: &str) {
        wait_for(&format!("{words:?} in the log of {name}"), || self.log(name).contains(words));
    }

    /// Runs a command of a shell in it, as the server's user: its exit code, and all it wrote.
    pub fn ran(&self, name: &str, command: &str) -> (i64, String) {
        let shell =
            format!("exec 2>&1; exec setpriv --reuid=postgres --regid=postgres --clear-groups sh -c '{command}'");
        self.runtime.block_on(async {
            let mut run = ok(self.containers[name].exec(ExecCommand::new(["sh", "-c", &shell])).await);
            let said = ok(run.stdout_to_vec().await);
            loop {
                if let Some(code) = ok(run.exit_code().await) {
                    return (code, String::from_utf8_lossy(&said).into_owned());
                }
            }
        })
    }

    /// The same; it must succeed.
    #[track_caller]
    pub fn done(&self, name: &str, command: &str) -> String {
        let (code, said) = self.ran(name, command);
        assert_eq!(code, 0, "{command}: {said}");
        said
    }

    /// `pgkeep …` in this container.
    #[track_caller]
    pub fn pgkeep(&self, name: &str, arguments: &str) -> String {
        self.done(name, &format!("pgkeep --config {CONFIG} {arguments}"))
    }

    /// Its address in one of its networks, as the host reaches it.
    pub fn address(&self, name: &str, network: &str) -> String {
        let found = ok(self.runtime.block_on(self.docker.inspect_container(&self.full(name), None)));
        let networks = found.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let address = networks.get(&self.full(network)).and_then(|endpoint| endpoint.ip_address.clone());
        address.filter(|address| !address.is_empty()).unwrap_or_else(|| panic!("{name} is not in {network}"))
    }

    /// How this process connects to servers: by address, since names resolve inside only.
    pub fn conninfo(&self, names: &[&str]) -> String {
        let addresses: Vec<_> = names.iter().filter_map(|name| self.any_address(name)).collect();
        format!("host={} user=postgres dbname=postgres target_session_attrs=any", addresses.join(","))
    }

    fn any_address(&self, name: &str) -> Option<String> {
        let found = self.runtime.block_on(self.docker.inspect_container(&self.full(name), None)).ok()?;
        let networks = found.network_settings?.networks?;
        networks.into_values().filter_map(|endpoint| endpoint.ip_address).find(|address| !address.is_empty())
    }

    pub fn try_sql(&self, name: &str, sql: &str) -> Result<String, String> {
        let info = ok(ConnInfo::resolve(&self.conninfo(&[name]), &Environment::default()));
        let options =
            ConnectOptions { application_name: "test".to_owned(), timeout: SOON, ..ConnectOptions::default() };
        let asked = async {
            let mut session = Session::connect(&info, &options).await?;
            session.query(sql).await
        };
        let rows = self.runtime.block_on(asked).map_err(|error: PgError| error.to_string())?;
        let row = |row: &pgkeep::pg::Row| ok::<String, _>(row.parse(0));
        Ok(rows.iter().map(row).collect::<Vec<_>>().join("\n"))
    }

    /// The first column of all rows, in lines.
    #[track_caller]
    pub fn sql(&self, name: &str, sql: &str) -> String {
        self.try_sql(name, sql).unwrap_or_else(|error| panic!("{name}: {sql}: {error}\n{}", self.log(name)))
    }
}

/// Every server of these tests: commits wait for pgkeep, from the first one on.
const CONF: &str = "synchronous_standby_names = pgkeep
max_connections = 30
shared_buffers = 32MB
lc_messages = C
wal_keep_size = 256MB
wal_sender_timeout = 4s";

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in self.containers.keys() {
                let log = self.log(name);
                let from = log.char_indices().rev().nth(6000).map_or(0, |(at, _)| at);
                eprintln!("---- {name}\n{}", &log[from..]);
            }
        }
        let containers = std::mem::take(&mut self.containers);
        self.runtime.block_on(async {
            for (name, container) in containers {
                if let Err(error) = container.rm().await {
                    eprintln!("{name} is not removed: {error}");
                }
            }
            for name in &self.networks {
                if let Err(error) = self.docker.remove_network(name).await {
                    eprintln!("{name} is not removed: {error}");
                }
            }
            for name in &self.volumes {
                if let Err(error) = self.docker.remove_volume(name, None::<RemoveVolumeOptions>).await {
                    eprintln!("{name} is not removed: {error}");
                }
            }
        });
    }
}

/// Asks `ready` again and again until it says yes. Not more often: an answer costs the engine, or a server, a process.
#[track_caller]
pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let since = Instant::now();
    while !ready() {
        assert!(since.elapsed() < SOON, "waited {SOON:?} for {what}, in vain");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Another image for servers of this major.
fn postgres_image(major: u32) -> Option<String> {
    std::env::var(format!("{IMAGE}_POSTGRES_{major}")).ok().filter(|image| !image.is_empty())
}

/// When a process was started, in the kernel's ticks: with its number that is one process alone.
fn started(pid: u32) -> String {
    let stat = ok(std::fs::read_to_string(format!("/proc/{pid}/stat")));
    let behind_name = stat.rsplit_once(") ").expect("the name is in parentheses").1;
    behind_name.split(' ').nth(19).expect("the 22nd field").to_owned()
}

/// Clients that commit rows into `judged (id bigint, filler text)`, and note each id whose commit has returned.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    count: usize,
}

struct Shared {
    stop: AtomicBool,
    next: AtomicU64,
    noted: Mutex<BTreeSet<u64>>,
    /// Where the server is; a change makes the clients let go of the old one.
    conninfo: watch::Sender<String>,
}

impl Load {
    /// So many, each as fast as it gets answers, up to 500 commits a second.
    pub fn start(conninfo: String, count: usize) -> Load {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            next: AtomicU64::new(1),
            noted: Mutex::default(),
            conninfo: watch::Sender::new(conninfo),
        });
        let client = |_| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(commit(&shared));
            })
        };
        let threads = (0..count).map(client).collect();
        Load { shared, threads, count }
    }

    /// Ids whose commits have returned.
    pub fn noted(&self) -> usize {
        self.shared.noted.lock().expect("clients do not panic").len()
    }

    /// Waits for so many more commits.
    #[track_caller]
    pub fn more(&self, commits: usize) {
        let wanted = self.noted() + commits;
        wait_for(&format!("{commits} more commits"), || self.noted() >= wanted);
    }

    /// Waits until every client waits for the archive, at five looks in a row, and none was let go between them (they all wait
    /// for a moment when nothing is wrong, too): what has returned is all that will for now.
    #[track_caller]
    pub fn wait_all_wait(&self, world: &World, server: &str) -> usize {
        let waiting = "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        let all = self.count.to_string();
        let (mut noted, mut looks) = (self.noted(), 0);
        wait_for("all clients to wait", || {
            let same = world.sql(server, waiting) == all && self.noted() == noted;
            (noted, looks) = (self.noted(), if same { looks + 1 } else { 0 });
            looks == 5
        });
        noted
    }

    /// The server is somewhere else now.
    pub fn redirect(&self, conninfo: String) {
        self.shared.conninfo.send_replace(conninfo);
    }

    /// Ends them, whatever they wait for; all ids whose commit has returned.
    #[track_caller]
    pub fn finish(self) -> BTreeSet<u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.conninfo.send_modify(|_| ());
        self.threads.into_iter().for_each(|thread| thread.join().expect("clients do not panic"));
        std::mem::take(&mut *self.shared.noted.lock().expect("clients do not panic"))
    }
}

async fn commit(shared: &Shared) {
    let mut moved = shared.conninfo.subscribe();
    while !shared.stop.load(Ordering::Relaxed) {
        let conninfo = moved.borrow_and_update().clone();
        let session = async {
            let info = ok(ConnInfo::resolve(&conninfo, &Environment::default()));
            let options = ConnectOptions { timeout: SOON, ..ConnectOptions::default() };
            let mut session = Session::connect(&info, &options).await?;
            loop {
                let id = shared.next.fetch_add(1, Ordering::Relaxed);
                session.query(&format!("INSERT INTO judged VALUES ({id}, repeat('x', {}))", id % 900)).await?;
                shared.noted.lock().expect("clients do not panic").insert(id);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let ended: Result<(), PgError> = tokio::select! { ended = session => ended, _ = moved.changed() => Ok(()) };
        if ended.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await; // it is away, or about to be
        }
    }
}
