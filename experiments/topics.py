"""What the experiments ask together: questions of readers by topic, and disputes between sources with their outcome."""

# Questions of `Experiment.reader_questions` in the order in which they are read; one that is not here comes last.
QUESTIONS = {
    "How it differs from what resembles it": (
        "What differs from Xavier initialization?",
        "What differs from weight decay?",
        "What differs from layer and instance norm?",
        "What differs from adding a linear layer?",
        "Why does batch norm not whiten its inputs, if whitening is what one wants?",
    ),
    "Where it can be used": (
        "Can batch norm be used in MLPs?",
        "Is batch norm worth while in a shallow network?",
        "Can batch norm be used after the activation?",
        "Can batch norm be used in recurrent networks?",
        "Is it enough to normalize the images, or one layer?",
        "Over what does batch norm average in a convolutional layer?",
        "Does batch norm still matter in a residual network?",
        "Can I train a deep network without batch norm?",
        "Why does a GAN need batch norm?",
    ),
    "How to train with it": (
        "Which batch size?",
        "What happens at a batch of 1?",
        "Is dropout still needed?",
        "Is weight decay of use with batch norm?",
        "Should a layer in front of batch norm have a bias?",
        "Should a batch fill the memory?",
        "What must be equal in a fair comparison?",
    ),
    "How to use a trained network": (
        "Which decay should the running averages have?",
        "How many examples do population statistics need?",
        "Why is my network good in training and erratic in testing?",
        "My inputs have changed: should I update the running statistics?",
        "Should batch norm be frozen for fine-tuning?",
        "Do averaged weights (EMA, SWA) need new statistics?",
        "Do random batch statistics tell what a network does not know?",
    ),
    "Why it works": (
        "Why does training get shorter although a step is longer?",
        "Does batch norm reduce internal covariate shift?",
        "Does batch norm prevent vanishing and exploding gradients?",
        "Is the loss smoother with batch norm?",
        "Does batch norm help at small learning rates?",
        "Is it the noise of the batch that makes batch norm generalize?",
        "Do lower layers become useless?",
        "Do lower layers learn last?",
    ),
}

GRADIENTS = "Does batch norm keep gradients from vanishing or exploding?"
SHIFT = "Does batch norm reduce internal covariate shift?"
SMALL_BATCHES = "Does the noise of small batches help, or do small batches hurt?"
DROPOUT = "Is dropout still needed?"
ORDER = "Which layers of a network learn last?"
CORRELATIONS = "Does removing correlations between units speed up learning?"
PLACE = "Does batch norm belong before or after the activation?"
IN_THE_END = "Does batch norm make a network more accurate in the end?"
RECURRENT = "Does batch norm help between the time steps of a recurrent network?"
SAMPLES = "Does batch norm make the samples of a GAN better?"

# What the claims on both sides of a dispute say together; `Claim.dispute` names it.
DISPUTES = {
    GRADIENTS: (
        "Both, by what one compares with. At the start batch norm makes gradients grow from layer to layer on the way"
        " down (their norm 1.1 to 1.2-fold), where a plain ReLU network with He's weights keeps them. Where weights"
        " have the wrong size or units saturate, those of the plain network vanish or explode much faster."
    ),
    SHIFT: (
        "It depends on what is called shift. With batch norm the inputs of layers move a quarter as far in a step,"
        " and the gradients of layers change two and a half times as much when the layers below them move."
    ),
    SMALL_BATCHES: (
        "Fewer examples in a statistic were never measurably better in our small networks: 16 in place of 256 made no"
        " difference that nine seeds tell (0.3%, -0.2% to 0.9%), 4 in place of 16 cost 2.2%, and 1 in place of 8 over"
        " 40%, most of it because running statistics do not fit. Small steps of SGD are another matter."
    ),
    DROPOUT: (
        "Not in our small network: with batch norm the dropout that was best on validation changed the accuracy by"
        " -0.2% (-0.6% to 0.2%), and a dropout of 0.5 cost 1.2%."
    ),
    ORDER: (
        "Lower layers were nearer to their final outputs all along, and yet it cost more to freeze them early than to"
        " freeze the upper ones. Batch norm made their lead smaller, not larger."
    ),
    CORRELATIONS: (
        "Not beyond what batch norm does: in a small MLP whitening took 1.7 times as many steps, and 3.6 times as"
        " many seconds."
    ),
    PLACE: (
        "It hardly matters: after the activation a network was 0.4% more accurate, less than the percent that we"
        " count as a difference."
    ),
    IN_THE_END: (
        "In a short training it did, by 2.4% on average over three small networks (0.1% to 4.7%), each at its own"
        " best rate. Of a training until nothing improves any more this says nothing."
    ),
    RECURRENT: (
        "Ten seeds do not tell: an LSTM without it took 1.07 times as many steps (0.86 to 1.32), one with it on the"
        " inputs alone 1.13 times (0.92 to 1.38)."
    ),
    SAMPLES: (
        "It did in the wider of our two GANs: the Frechet distance of samples from real digits was an eighth of that"
        " without, a quarter where the plain GAN starts from He's weights, and 0.57 where both do. Of the narrow one,"
        " after fewer steps, three seeds do not tell."
    ),
}
