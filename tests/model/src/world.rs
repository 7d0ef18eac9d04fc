//! What every model here is asked, and how it is asked.
//!
//! [`stateright`] goes through all states that can be reached. Of each of them three things must be true:
//!
//! * [`SOUND`]: nothing went wrong on the way here: no panic, no invariant of a state machine broken, no wrong byte.
//! * [`CONSERVED`]: nothing that is counted got lost or was added, the frames under way included.
//! * [`PROGRESS`]: if from here on only what is *due* happens (an end that can send sends, what is under way arrives, a reader
//!   reads), the world comes to rest after finitely many steps, and there everything is done. Where steps that are due
//!   are left is never a place to rest; so a state from which this holds is no deadlock, and does not lead into a circle that
//!   only luck gets out of.
//!
//! Every state is asked the third question, so it is enough to go from each along *one* order of the due steps: all other orders
//! lead through states that are asked themselves. For the same reason the way need not be gone further than to a state whose answer
//! is known ([`Settled`]), and all answers together cost little more than one look at each state.
//!
//! A world also names sights that must be seen somewhere ([`World::sights`]): a window used up, a channel full. A
//! search that never comes there would show nothing.

use std::collections::HashSet;
use std::fmt::{self, Debug, Write as _};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model, Path, Property};

/// Nothing went wrong so far.
pub const SOUND: &str = "nothing goes wrong";
/// What is counted is conserved.
pub const CONSERVED: &str = "credit is conserved";
/// No deadlock and no circle.
pub const PROGRESS: &str = "all gets done if only what is due happens";

/// Due steps after which nothing may be left to do.
const PATIENCE: usize = 5_000;

/// States from which all gets done, by their hash.
#[derive(Debug, Default)]
pub struct Settled(Mutex<HashSet<u64>>);

/// A state of a [`World`].
pub trait Scene: Clone + Hash + Send + Sync + 'static {
    /// What went wrong on the way here.
    fn wrong(&self) -> Option<&str>;
    /// Notes that something did.
    fn blame(&mut self, what: String);
    /// Where things stand, in a line.
    fn tell(&self) -> String;
}

/// A state as the search keeps it. Two are the same if they hash alike, which is what the search goes by too.
#[derive(Clone)]
pub struct Seen<S>(pub S);

impl<S: Hash> Hash for Seen<S> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl<S: Hash> PartialEq for Seen<S> {
    fn eq(&self, other: &Self) -> bool {
        hash(self) == hash(other)
    }
}

/// Something that must be seen somewhere.
pub type Sight<W> = Property<Search<W>>;

/// A model of two ends and what is between them.
pub trait World: Send + Sync + Sized + 'static {
    /// Where everything stands.
    type Scene: Scene;
    /// One thing that happens.
    type Step: Clone + Debug + PartialEq + Send + Sync;

    /// Where it starts.
    fn starts(&self) -> Vec<Self::Scene>;
    /// All that may happen next, and perhaps more.
    fn steps(&self, scene: &Self::Scene) -> Vec<Self::Step>;
    /// Whether a step must be taken sooner or later, unless another makes it impossible.
    fn is_due(step: &Self::Step) -> bool;
    /// Takes a step; returns whether it did anything. One that could not may still have turned the ends' lines.
    fn take(&self, scene: &mut Self::Scene, step: &Self::Step) -> bool;
    /// Whether what is counted adds up.
    fn conserved(&self, scene: &Self::Scene) -> bool;
    /// Nothing that is due is left: whether everything is done.
    ///
    /// # Errors
    /// If not: what is missing.
    fn done(&self, scene: &Self::Scene) -> Result<(), String>;
    /// What must be seen.
    fn sights(&self) -> Vec<Sight<Self>>;
}

/// A [`World`] in the shape that is searched.
pub struct Search<W> {
    world: W,
    settled: Settled,
}

impl<W: World> Search<W> {
    /// Takes a step. A panic is a finding, not the end of the search.
    fn step(&self, scene: &mut W::Scene, step: &W::Step) -> bool {
        let taken = catch_unwind(AssertUnwindSafe(|| self.world.take(scene, step)));
        taken.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            scene.blame(format!("panic: {}", text.unwrap_or("?")));
            true
        })
    }

    /// What is searched.
    pub fn world(&self) -> &W {
        &self.world
    }

    /// Does what is due until all is done.
    fn settle(&self, scene: &W::Scene) -> Result<(), String> {
        let known = |hash: &u64| self.settled.0.lock().is_ok_and(|set| set.contains(hash));
        if known(&hash(scene)) {
            return Ok(());
        }
        let mut scene = scene.clone();
        let mut way = Vec::new();
        loop {
            let here = hash(&scene);
            if known(&here) {
                break;
            }
            way.push(here);
            if way.len() > PATIENCE {
                return Err(format!("it never ends: {}", scene.tell()));
            }
            if let Some(wrong) = scene.wrong() {
                return Err(wrong.to_owned());
            }
            let steps = self.world.steps(&scene);
            let mut due = steps.iter().filter(|step| W::is_due(step));
            if !due.any(|step| self.step(&mut scene, step)) {
                self.world
                    .done(&scene)
                    .map_err(|missing| format!("{missing}; at rest: {}", scene.tell()))?;
                break;
            }
        }
        if let Ok(mut set) = self.settled.0.lock() {
            set.extend(way);
        }
        Ok(())
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl<W: World> Model for Search<W> {
    type State = Seen<W::Scene>;
    type Action = W::Step;

    fn init_states(&self) -> Vec<Self::State> {
        self.world.starts().into_iter().map(Seen).collect()
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Self::Action>) {
        if state.0.wrong().is_none() {
            actions.extend(self.world.steps(&state.0));
        }
    }

    fn next_state(&self, last: &Self::State, step: Self::Action) -> Option<Self::State> {
        let mut next = last.clone();
        let done = self.step(&mut next.0, &step);
        (done || W::is_due(&step)).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(SOUND, |_, state: &Seen<W::Scene>| state.0.wrong().is_none()),
            Property::always(CONSERVED, |search: &Self, state: &Seen<W::Scene>| {
                search.world.conserved(&state.0)
            }),
            Property::always(PROGRESS, |search: &Self, state: &Seen<W::Scene>| {
                state.0.wrong().is_some() || search.settle(&state.0).is_ok()
            }),
        ];
        properties.extend(self.world.sights());
        properties
    }
}

/// How far a search went.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Different states.
    pub states: usize,
    /// Steps that were tried and changed something.
    pub steps: usize,
    /// The most steps from a start.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Extent {
            states,
            steps,
            depth,
            took,
        } = self;
        let took = took.as_secs_f32();
        write!(
            f,
            "{states:9} states, {steps:9} steps, depth {depth:3}, {took:6.1} s"
        )
    }
}

/// What a search found.
#[derive(Debug)]
pub enum Finding {
    /// Something is not true in some state: which property, and the way there.
    Broken(&'static str, String),
    /// Nobody ever came there.
    Unseen(&'static str),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Broken(property, way) => write!(f, "not true: {property}\n{way}"),
            Finding::Unseen(sight) => write!(f, "never seen: {sight}"),
        }
    }
}

/// Goes through all states of a world, nearest first; stops at the first one in which something is not true.
///
/// # Errors
/// With what is not true, or never seen.
pub fn search<W: World>(world: W) -> Result<Extent, Finding> {
    let start = Instant::now();
    let search = Search {
        world,
        settled: Settled::default(),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker = search
        .checker()
        .threads(threads)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation, found) {
            (Expectation::Sometimes, None) => return Err(Finding::Unseen(property.name)),
            (Expectation::Always, Some(path)) => {
                let way = way(checker.model(), path);
                return Err(Finding::Broken(property.name, way));
            }
            _ => {}
        }
    }
    Ok(Extent {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: start.elapsed(),
    })
}

/// The way to a state in words, a line for each step, and what is the matter there.
fn way<W: World>(search: &Search<W>, path: Path<Seen<W::Scene>, W::Step>) -> String {
    let mut text = String::new();
    let path = path.into_vec();
    for (at, (state, step)) in path.iter().enumerate() {
        let step = step.as_ref().map(|step| format!("{step:?}"));
        let step = step.unwrap_or_default();
        _ = writeln!(text, "{at:4}  {}\n      {step}", state.0.tell());
    }
    if let Some((last, _)) = path.last() {
        let matter = match last.0.wrong() {
            Some(wrong) => Err(wrong.to_owned()),
            None => search.settle(&last.0),
        };
        if let Err(matter) = matter {
            _ = writeln!(text, "      => {matter}");
        }
    }
    text
}
