//! Tests of the whole room: the archiver with everything around it replaced.

mod simulation;
