"""Molecules by diffusion: the front door of the course. Notebooks write `helpers.x`; each x lives in one of the rooms.

The rooms are the files of `molecule_diffusion/`, in the order in which data flows; each imports only from those above.

    checks         what every room asks of its arguments; which of how many processes this is
    files          paths, atomic writes, checksums
    chemistry      graph <-> RDKit <-> SMILES, what counts as valid, types and parts of molecules, their properties
    qm9            all of QM9: graphs, targets, the fixed split, geometries, PyTorch Geometric's `Data`
    smiles_files   a user's own molecules
    encodings      graph <-> tensor: one-hot tokens, graph vectors, images, sequences
    grammar        a language of expressions, and expressions as sequences of its rules
    schedules      ᾱ, q(x_t | x_0), the posterior; noise schedules and samplers
    conditions     tables of conditions, their files, the condition encoder
    models         networks that are trained: TokenVAE, SequenceVAE, GraphDenoiser, LatentDenoiser
    graph_denoisers  two more for graph diffusion: the graph as an image, and the graph as a graph
    matching       which atom is which: a true graph against a decoder's probabilities
    graphvae       GraphVAE of Simonovsky & Komodakis
    oracle         the judge: properties from a molecular graph
    sentences      a sentence as 384 numbers, by an open sentence model
    captions       structural facts with SMARTS and words; captions; what a query asks for
    ranking        measures of a ranking, baselines
    retrieval      one space for sentences and molecules: network, losses, miners, pairs, pipeline
    pipelines      every generator as a diffusers pipeline; the sampling loop stands in its `__call__`
    training       `fit`, saved states, the losses
    sequences      a VAE, latent diffusion and a prior for any file of one-hot sequences; who judges what they draw
    sequence_table  the one table of such a system, and its command
    evaluation     strict scores, framing rows, obedience, tables
    checkpoints    loading and saving trained pipelines, their cards
    open_models    published pipelines that draw pictures: whether their weights are here, loading, drawing
    scoring        scores of whole pipelines, for curves and cards
    recipes        one `Recipe` per checkpoint, and `train`
    drawing        colours, the drawing of molecules, captions
    viewers        grids, graphs, film strips, maps, histograms, curves
    study_pictures  rows of a study with their seeds; latent diffusion as a picture
    viewer_3d      molecules to turn
    vae_pictures   the networks of notebook 02, and the beliefs of a matching
    retrieval_pictures  the retriever's towers, and what each loss pulls and pushes
    search         molecules by a sentence: the index, the domain, what is found and why
    sampling       any number of molecules to a file
    benchmark      every shipped generator over several seeds: README's table
    curve          every generator after so many minutes of training on one core
    exercises/     the checks and the predictions: `checking`, `predicting`, then one file per notebook
    notebooks      set-up check; run and save a notebook; repeat a study
    cli            the command line, `python helpers.py --help`

To find out what `helpers.q_sample` does: `helpers.q_sample??` in a cell, or the import below and then the room's file.
Importing this module is quick and changes nothing: libraries that one room alone needs are imported inside it.
"""

from molecule_diffusion.files import CHECKPOINTS, RESULTS, ROOT, TRAINING
from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    BOND_TYPES,
    MAX_ATOMS,
    NO_ATOM,
    PAIRS,
    PARTS,
    PROPERTIES,
    TYPES,
    ChargedMoleculeError,
    check_graphs,
    corrected_smiles,
    count_hydrogens,
    describe,
    mask_bonds,
    matrix_from_pairs,
    pairs_from_matrix,
    properties,
    to_graph,
    to_graphs,
    to_mols,
    to_smiles,
)
from molecule_diffusion.qm9 import QM9, TARGETS, load_qm9, to_pyg
from molecule_diffusion.smiles_files import load_smiles
from molecule_diffusion.encodings import (
    align,
    apply_thresholds,
    expected_graph,
    graph_image,
    graph_sequence,
    graph_vector,
    image_vector,
    one_hot,
    one_hot_graphs,
    sequence_graph,
    split_vector,
    vector_graph,
)
from molecule_diffusion.grammar import (
    EXPRESSION_RULES,
    expression_sequences,
    expression_value,
    parse_expression,
    random_expressions,
    spell_expression,
)
from molecule_diffusion.schedules import (
    GRAPH_NOISE_SCHEDULE,
    NOISE_SCHEDULE,
    SAMPLER,
    PowerSpacedDPMSolver,
    alpha_bars,
    cosine_betas,
    posterior_mean,
    q_sample,
    sampler,
)
from molecule_diffusion.conditions import (
    CONDITION_TARGETS,
    ConditionEncoder,
    condition_table,
    load_conditions,
    save_conditions,
)
from molecule_diffusion.models import (
    GraphDenoiser,
    LatentDenoiser,
    PairHead,
    ResidualBlock,
    SequenceVAE,
    TokenVAE,
    encode_graphs,
    kl_divergence,
    reparameterise,
    slerp,
    standardise,
    timestep_embedding,
)
from molecule_diffusion.graph_denoisers import structure
from molecule_diffusion.matching import (
    SoftGraph,
    as_soft_graph,
    assign,
    match_graphs,
    max_pooling,
    reorder,
    similarities,
)
from molecule_diffusion.graphvae import GraphVAE
from molecule_diffusion.oracle import PropertyOracle
from molecule_diffusion.sentences import cached_embeddings, embed_sentences, load_sentence_model
from molecule_diffusion.captions import (
    FACTS,
    caption_table,
    describe_facts,
    fact_table,
    facts_in,
    leaks,
    make_caption,
    relevance,
    why,
    write_captions,
)
from molecule_diffusion.ranking import (
    average_precision,
    interval,
    morgan,
    pr_curve,
    precision_at,
    recall_at,
    retrieval_scores,
    scaffold_split,
    tanimoto,
    trigram_similarity,
)
from molecule_diffusion.retrieval import (
    LOSSES,
    Retriever,
    RetrieverPipeline,
    metric_loss,
    mine,
    molecule_features,
    qm9_facts,
    retrieval_loss,
    retrieval_queries,
    training_pairs,
)
from molecule_diffusion.pipelines import (
    DiffusionPriorPipeline,
    GraphDDPMPipeline,
    GraphVAEPipeline,
    LatentDiffusionPipeline,
    MoleculeOutput,
    PropertyOraclePipeline,
    TokenVAEPipeline,
)
from molecule_diffusion.training import TrainingError, diffusion_loss, fit, graph_diffusion_loss, prior_loss, vae_loss
from molecule_diffusion.sequences import SequencePipeline
from molecule_diffusion.sequence_table import train_sequences
from molecule_diffusion.evaluation import (
    Evaluation,
    evaluate,
    exact_match,
    fcd_to_validation,
    framing_rows,
    obedience,
    random_graphs,
    reconstruction_accuracy,
    results_table,
)
from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.open_models import OPEN_MODELS, OpenModel, draw_images, load_open_model, weights_in_cache
from molecule_diffusion.scoring import graphvae_scores
from molecule_diffusion.recipes import RECIPES, Recipe, train
from molecule_diffusion.drawing import COLOURS, show_figure, show_image
from molecule_diffusion.viewers import (
    course_map,
    show_diagram,
    show_expressions,
    show_filmstrip,
    show_graph,
    show_grid,
    show_latent_filmstrip,
    show_loss,
    show_map,
    show_properties,
    training_curve,
)
from molecule_diffusion.study_pictures import show_seeds, show_two_stages
from molecule_diffusion.viewer_3d import show_3d
from molecule_diffusion.vae_pictures import show_beliefs, show_network
from molecule_diffusion.retrieval_pictures import show_pulls, show_towers
from molecule_diffusion.search import build_index, molecule_index, search
from molecule_diffusion.curve import curve_figure
from molecule_diffusion.exercises.checking import checked, solved
from molecule_diffusion.exercises.predicting import compare, predict
from molecule_diffusion.exercises.notebook_00 import line_up
from molecule_diffusion.exercises.notebook_03 import lettered_schedules
from molecule_diffusion.exercises.notebook_04 import repaint
from molecule_diffusion.exercises.notebook_05 import BRIEF
from molecule_diffusion.exercises.notebook_06_lab import patient
from molecule_diffusion.exercises.notebook_07 import example_curves
from molecule_diffusion.exercises.notebook_07_lab import try_miner
from molecule_diffusion.notebooks import check_setup, study_rows
from molecule_diffusion.cli import main

__all__ = """
CHECKPOINTS RESULTS ROOT TRAINING ATOM_TYPES BOND_TYPES MAX_ATOMS NO_ATOM PAIRS PARTS PROPERTIES TYPES
ChargedMoleculeError check_graphs corrected_smiles count_hydrogens describe mask_bonds matrix_from_pairs
pairs_from_matrix properties to_graph to_graphs to_mols to_smiles QM9 TARGETS load_qm9 to_pyg load_smiles align
apply_thresholds expected_graph graph_image graph_sequence graph_vector image_vector one_hot one_hot_graphs
sequence_graph split_vector vector_graph EXPRESSION_RULES expression_sequences expression_value parse_expression
random_expressions spell_expression GRAPH_NOISE_SCHEDULE NOISE_SCHEDULE SAMPLER PowerSpacedDPMSolver alpha_bars
cosine_betas posterior_mean q_sample sampler CONDITION_TARGETS ConditionEncoder condition_table load_conditions
save_conditions GraphDenoiser LatentDenoiser PairHead ResidualBlock SequenceVAE TokenVAE encode_graphs kl_divergence
reparameterise slerp standardise timestep_embedding structure SoftGraph as_soft_graph assign match_graphs max_pooling
reorder similarities GraphVAE PropertyOracle cached_embeddings embed_sentences load_sentence_model FACTS caption_table
describe_facts fact_table facts_in leaks make_caption relevance why write_captions average_precision interval morgan
pr_curve precision_at recall_at retrieval_scores scaffold_split tanimoto trigram_similarity LOSSES Retriever
RetrieverPipeline metric_loss mine molecule_features qm9_facts retrieval_loss retrieval_queries training_pairs
DiffusionPriorPipeline GraphDDPMPipeline GraphVAEPipeline LatentDiffusionPipeline MoleculeOutput PropertyOraclePipeline
TokenVAEPipeline TrainingError diffusion_loss fit graph_diffusion_loss prior_loss vae_loss SequencePipeline
train_sequences Evaluation evaluate exact_match fcd_to_validation framing_rows obedience random_graphs
reconstruction_accuracy results_table load_pipeline OPEN_MODELS OpenModel draw_images load_open_model weights_in_cache
graphvae_scores RECIPES Recipe train COLOURS show_figure show_image course_map show_diagram show_expressions
show_filmstrip show_graph show_grid show_latent_filmstrip show_loss show_map show_properties training_curve show_seeds
show_two_stages show_3d show_beliefs show_network show_pulls show_towers build_index molecule_index search curve_figure
checked solved compare predict line_up lettered_schedules repaint BRIEF patient example_curves try_miner check_setup
study_rows main
""".split()

if __name__ == "__main__":
    main()
